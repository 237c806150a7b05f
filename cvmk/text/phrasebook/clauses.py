"""Sentences about what people do: tenses, modal verbs, questions, and the word order of German clauses.

An activity is a verb with what belongs to it; each template puts its parts where German wants them: the finite verb
second, first in questions and last in subordinate clauses, particles and infinitives at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from cvmk.text.phrasebook import lexicon, verbs
from cvmk.text.phrasebook.choice import Choice, Template
from cvmk.text.phrasebook.grammar import Both, Subject, Verb, after, noun_phrase

VERBS = verbs.VERBS
HAVE = VERBS["have"]
BE = VERBS["be"]


@dataclass(frozen=True)
class Activity:
    """A verb and the rest of its phrase in both languages."""

    verb: Verb
    en: str
    de: str

    def base(self) -> str:
        return f"{self.verb.en} {self.en}"

    def past(self) -> str:
        return f"{self.verb.en_past} {self.en}"

    def infinitive(self) -> str:
        return f"{self.de} {self.verb.infinitive}"

    def zu(self) -> str:
        return f"{self.de} {self.verb.zu()}"

    def end(self) -> str:
        """What follows the finite verb in a main clause."""
        return f"{self.de} {self.verb.particle}".rstrip()

    def perfect_end(self) -> str:
        return f"{self.de} {self.verb.participle}"

    def auxiliary(self, person: str) -> str:
        return (BE if self.verb.auxiliary == "sein" else HAVE).present(person)


CHOSEN = ("buy", "sell", "look for", "bring along", "try on")  # what one can want, may or plan
BEFALLEN = (*CHOSEN, "need", "find", "lose")
MEETING = ("visit", "call", "pick up", "invite")


def activity(choice: Choice, owner: str, chosen: bool = True) -> Activity:
    """Something to do, or with `chosen` off also something that happens; `owner` is the possessive of the subject."""
    kind = choice.between(0, 13)
    if kind <= 3:
        verb = choice.one(CHOSEN if chosen else BEFALLEN)
        if verb == "try on":
            return Activity(VERBS[verb], *noun_phrase("this", choice.one(lexicon.CLOTHES), "acc", choice.one(lexicon.COLOURS)))
        return Activity(VERBS[verb], *choice.ware(owner if verb in ("sell", "bring along", "lose") else "a", "acc"))
    if kind <= 6:
        return Activity(VERBS[choice.one(MEETING)], *choice.relative("acc", owner))
    if kind == 7:
        return Activity(VERBS["help"], *choice.relative("dat", owner))
    if kind == 8:
        en, de = choice.place("the", "acc", lexicon.INSIDE_PLACES)
        return Activity(VERBS["go"], f"into {en}", after("in", de))
    if kind == 9:
        (en, de), (vehicle_en, vehicle_de) = choice.one(lexicon.CITIES), noun_phrase("the", choice.one(lexicon.LONG_DISTANCE), "dat")
        return Activity(VERBS["travel"], f"to {en} by {vehicle_en[4:]}", f"{after('mit', vehicle_de)} nach {de}")
    if kind == 10:
        noun = choice.one(lexicon.WARM_DISHES)
        adjective = choice.one(lexicon.WARM_ADJECTIVES) if choice.chance(0.5) else None
        return Activity(VERBS[choice.one(("eat", "order"))], *noun_phrase("a", noun, "acc", adjective))
    if kind == 11:
        verb, objects = choice.one((("learn", lexicon.NATIONAL), ("play", lexicon.GAMES)))
        return Activity(VERBS[verb], *choice.one(objects))
    if kind == 12:
        en, de = noun_phrase("the", choice.one(lexicon.ROOM_PARTS), "acc")
        return Activity(VERBS["tidy up"], en, de)
    preposition_en, preposition_de = choice.one(lexicon.RELATIVE_POSITIONS[:3])
    en, de = choice.place("the", "dat", adjective=0)
    return Activity(VERBS["wait"], f"{preposition_en} {en}", after(preposition_de, de))


def modal(choice: Choice, person: str) -> Both:
    """An English modal with its "to", and the German finite form."""
    en, key = choice.one(verbs.MODALS)
    verb = VERBS[key]
    return en.replace(verb.en, verb.english(person), 1), verb.present(person)


def future(choice: Choice) -> Both:
    return choice.day() if choice.chance(0.4) else choice.one(lexicon.FUTURE)


def wish(choice: Choice) -> Both:
    subject, (en_time, de_time) = choice.subject(), future(choice)
    doing, (en_modal, de_modal) = activity(choice, subject.owner), modal(choice, subject.person)
    return f"{subject.en} {en_modal} {doing.base()} {en_time}.", f"{subject.de} {de_modal} {de_time} {doing.infinitive()}."


def wish_after_time(choice: Choice) -> Both:
    subject, (en_time, de_time) = choice.subject(), future(choice)
    doing, (en_modal, de_modal) = activity(choice, subject.owner), modal(choice, subject.person)
    return f"{en_time} {subject.en} {en_modal} {doing.base()}.", f"{de_time} {de_modal} {subject.de} {doing.infinitive()}."


def plan(choice: Choice) -> Both:
    subject, (en_time, de_time) = choice.subject(), future(choice)
    doing = activity(choice, subject.owner)
    return f"{subject.en} will {doing.base()} {en_time}.", f"{subject.de} {doing.verb.present(subject.person)} {de_time} {doing.end()}."


def plan_after_time(choice: Choice) -> Both:
    subject, (en_time, de_time) = choice.subject(), future(choice)
    doing = activity(choice, subject.owner)
    return f"{en_time} {subject.en} will {doing.base()}.", f"{de_time} {doing.verb.present(subject.person)} {subject.de} {doing.end()}."


def past(choice: Choice) -> Both:
    subject, (en_time, de_time) = choice.subject(), choice.one(lexicon.PAST)
    doing = activity(choice, subject.owner, chosen=False)
    return f"{subject.en} {doing.past()} {en_time}.", f"{subject.de} {doing.auxiliary(subject.person)} {de_time} {doing.perfect_end()}."


def past_after_time(choice: Choice) -> Both:
    subject, (en_time, de_time) = choice.subject(), choice.one(lexicon.PAST)
    doing = activity(choice, subject.owner, chosen=False)
    return f"{en_time} {subject.en} {doing.past()}.", f"{de_time} {doing.auxiliary(subject.person)} {subject.de} {doing.perfect_end()}."


def question(choice: Choice) -> Both:
    subject, (en_time, de_time) = choice.subject(), future(choice)
    doing, (english, key) = activity(choice, subject.owner), choice.one(verbs.MODALS)
    if subject.person == "1":  # nobody asks others what he wants himself
        english, key = "should", "should"
    if key == "want":
        opening = f"{'does' if subject.person == '3' else 'do'} {subject.en} want to"
    elif key == "would like":
        opening = f"would {subject.en} like to"
    else:
        opening = f"{english} {subject.en}"
    return f"{opening} {doing.base()} {en_time}?", f"{VERBS[key].present(subject.person)} {subject.de} {de_time} {doing.infinitive()}?"


def past_question(choice: Choice) -> Both:
    subject, (en_time, de_time) = choice.subject(), choice.one(lexicon.PAST)
    doing = activity(choice, subject.owner, chosen=False)
    return f"did {subject.en} {doing.base()} {en_time}?", f"{doing.auxiliary(subject.person)} {subject.de} {de_time} {doing.perfect_end()}?"


OPINIONS: tuple[Both, ...] = (
    ("I think that", "ich glaube, dass"), ("I hope that", "ich hoffe, dass"), ("I know that", "ich weiß, dass"),
    ("we hope that", "wir hoffen, dass"), ("it is possible that", "es ist möglich, dass"), ("it is good that", "es ist gut, dass"),
)  # fmt: skip
DOUBTS: tuple[Both, ...] = (
    ("do you know whether", "wissen Sie, ob"), ("I do not know whether", "ich weiß nicht, ob"), ("I would like to know whether", "ich möchte wissen, ob"),
)  # fmt: skip


def opinion(choice: Choice) -> Both:
    subject, (en_time, de_time), (en, de) = choice.subject(), future(choice), choice.one(OPINIONS)
    doing = activity(choice, subject.owner)
    return f"{en} {subject.en} will {doing.base()} {en_time}.", f"{de} {subject.de} {de_time} {doing.de} {doing.verb.joined(subject.person)}."


def modal_opinion(choice: Choice) -> Both:
    subject, (en, de) = choice.subject(), choice.one(OPINIONS)
    doing, (en_modal, de_modal) = activity(choice, subject.owner), modal(choice, subject.person)
    return f"{en} {subject.en} {en_modal} {doing.base()}.", f"{de} {subject.de} {doing.infinitive()} {de_modal}."


def doubt(choice: Choice) -> Both:
    subject, (en_time, de_time), (en, de) = choice.subject(), choice.one(lexicon.PAST), choice.one(DOUBTS)
    doing = activity(choice, subject.owner, chosen=False)
    mark = "?" if en.startswith("do ") else "."
    return (
        f"{en} {subject.en} {doing.past()} {en_time}{mark}",
        f"{de} {subject.de} {de_time} {doing.perfect_end()} {doing.auxiliary(subject.person)}{mark}",
    )


def reason(choice: Choice) -> Both:
    subject, (en_time, de_time), mood = choice.one(verbs.PRONOUNS), choice.one(lexicon.PAST), choice.one(lexicon.MOODS)
    doing = activity(choice, subject.owner, chosen=False)
    en_be = {"1": "am", "3": "is"}.get(subject.person, "are")
    return (
        f"{subject.en} {en_be} {mood.en} because {subject.en} {doing.past()} {en_time}.",
        f"{subject.de} {BE.present(subject.person)} {mood.de}, weil {subject.de} {de_time} {doing.perfect_end()} {doing.auxiliary(subject.person)}.",
    )


def attempt(choice: Choice) -> Both:
    subject, verb = choice.subject(), VERBS[choice.one(("try", "hope"))]
    doing = activity(choice, subject.owner)
    return f"{subject.en} {verb.english(subject.person)} to {doing.base()}.", f"{subject.de} {verb.present(subject.person)}, {doing.zu()}."


def advice(choice: Choice) -> Both:
    (en, de), (en_time, de_time) = choice.one(ADVICE), future(choice)
    doing = activity(choice, "your")
    return f"it is {en} to {doing.base()} {en_time}.", f"es ist {de}, {de_time} {doing.zu()}."


ADVICE: tuple[Both, ...] = (("important", "wichtig"), ("easy", "leicht"), ("difficult", "schwierig"), ("possible", "möglich"), ("better", "besser"))


def purpose(choice: Choice) -> Both:
    subject, (en, de) = choice.subject(), choice.one(lexicon.CITIES)
    doing = activity(choice, subject.owner)
    travel = VERBS["travel"]
    return (
        f"{subject.en} {travel.english(subject.person)} to {en} to {doing.base()}.",
        f"{subject.de} {travel.present(subject.person)} nach {de}, um {doing.zu()}.",
    )


def condition(choice: Choice) -> Both:
    subject, (en_day, de_day), (en_weather, de_weather) = choice.subject(), choice.weekday(), choice.one(lexicon.WEATHER)
    doing = activity(choice, subject.owner)
    return (
        f"if it is {en_weather} on {en_day}, {subject.en} will {doing.base()}.",
        f"wenn es am {de_day} {de_weather} ist, {doing.verb.present(subject.person)} {subject.de} {doing.end()}.",
    )


def lacks(subject: Subject) -> str:
    return f"{subject.en} {'does' if subject.person == '3' else 'do'} not"


def lack(choice: Choice) -> Both:
    subject, verb = choice.subject(), VERBS[choice.one(("have", "need", "find"))]
    en, de = choice.ware("no", "acc")
    words = en.removeprefix("no ")
    article = "an" if words[0] in "aeiou" else "a"
    return f"{lacks(subject)} {verb.en} {article} {words}.", f"{subject.de} {verb.present(subject.person)} {de}."


TEMPLATES: tuple[Template, ...] = (
    Template(wish, 8),
    Template(wish_after_time, 5),
    Template(plan, 6),
    Template(plan_after_time, 4),
    Template(past, 7),
    Template(past_after_time, 4),
    Template(question, 5),
    Template(past_question, 4),
    Template(opinion, 4),
    Template(modal_opinion, 3),
    Template(doubt, 3),
    Template(reason, 4),
    Template(attempt, 3),
    Template(advice, 2),
    Template(purpose, 3),
    Template(condition, 3),
    Template(lack, 3),
)
