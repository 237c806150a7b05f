"""Sentences for the day: food and drink, shopping, family, the body, numbers."""

from __future__ import annotations

from cvmk.text.phrasebook import lexicon, numbers, verbs
from cvmk.text.phrasebook.choice import OWNERS, Choice, Template
from cvmk.text.phrasebook.grammar import RELATIVE, Both, Case, after, counted, noun_phrase

VERBS = verbs.VERBS


def dish(choice: Choice, determiner: str, case: Case, adjective: float = 0.5) -> Both:
    if choice.chance(0.5):
        return noun_phrase(determiner, choice.one(lexicon.WARM_DISHES), case, choice.one(lexicon.WARM_ADJECTIVES) if choice.chance(adjective) else None)
    return noun_phrase(determiner, choice.one(lexicon.DISHES), case, choice.one(lexicon.FOOD_ADJECTIVES) if choice.chance(adjective) else None)


def drink(choice: Choice) -> Both:
    """ "a cup of hot tea", accusative: the drink stands in the same case as its measure, with a strong adjective."""
    if choice.chance(0.4):
        vessel, noun, adjectives = lexicon.CUP, choice.one(lexicon.HOT_DRINKS), lexicon.HOT_ADJECTIVES
    else:
        vessel, noun, adjectives = choice.one((lexicon.GLASS, lexicon.BOTTLE)), choice.one(lexicon.COLD_DRINKS), lexicon.COLD_ADJECTIVES
    en, de = noun_phrase("", noun, "acc", choice.one(adjectives) if choice.chance(0.5) else None)
    if choice.chance(0.5):
        en_vessel, de_vessel = noun_phrase("a", vessel, "acc")
    else:
        en_vessel, de_vessel = counted(choice.count(), vessel, "acc")
    return f"{en_vessel} of {en}", f"{de_vessel} {de}"


def groceries(choice: Choice) -> Both:
    """An amount of something, accusative."""
    if choice.chance(0.5):
        noun, adjective = choice.one(lexicon.PRODUCE), choice.one(lexicon.PRODUCE_ADJECTIVES)
        en, de = noun_phrase("", noun, "acc", adjective if choice.chance(0.6) else None, plural=True)
        if choice.chance(0.5):
            return counted(choice.count(20), noun, "acc", adjective if choice.chance(0.6) else None)
        value = choice.between(1, 9)
        return (f"a kilo of {en}", f"ein Kilo {de}") if value == 1 else (f"{numbers.english(value)} kilos of {en}", f"{numbers.german(value)} Kilo {de}")
    en, de = noun_phrase("", choice.one(lexicon.WEIGHED), "acc", choice.one(lexicon.MASS_ADJECTIVES) if choice.chance(0.5) else None)
    weight = numbers.number(50 * choice.between(2, 19))
    return f"{weight[0]} grams of {en}", f"{weight[1]} Gramm {de}"


def with_or_without(choice: Choice) -> Both:
    noun = choice.one(lexicon.SPREADS)
    if choice.chance(0.5):
        en, de = noun_phrase("", noun, "dat", choice.one(lexicon.MASS_ADJECTIVES) if choice.chance(0.4) else None)
        return f"with {en}", f"mit {de}"
    return f"without {noun.en}", f"ohne {noun.de}"


def order(choice: Choice) -> Both:
    (en, de), (en_extra, de_extra) = dish(choice, "a", "acc"), with_or_without(choice)
    if choice.chance(0.5):
        return f"I would like {en} {en_extra}, please.", f"ich möchte bitte {de} {de_extra}."
    return f"could you bring me {en} {en_extra}, please?", f"könnten Sie mir bitte {de} {de_extra} bringen?"


def order_two(choice: Choice) -> Both:
    (en, de), (en_drink, de_drink) = dish(choice, "a", "acc"), drink(choice)
    opening = choice.one((("I would like", "ich möchte"), ("we would like", "wir möchten"), ("I will take", "ich nehme"), ("we will take", "wir nehmen")))
    return f"{opening[0]} {en} and {en_drink}.", f"{opening[1]} {de} und {de_drink}."


def order_for(choice: Choice) -> Both:
    subject, (en, de), (en_part, de_part) = choice.subject(), drink(choice), choice.one(lexicon.DAY_PARTS)
    verb = VERBS["drink"]
    return f"{subject.en} {verb.english(subject.person)} {en} {en_part}.", f"{subject.de} {verb.present(subject.person)} {de_part} {de}."


def market(choice: Choice) -> Both:
    (en, de), (en_second, de_second) = groceries(choice), groceries(choice)
    if choice.chance(0.5):
        return f"please give me {en}.", f"geben Sie mir bitte {de}."
    return f"I need {en} and {en_second}.", f"ich brauche {de} und {de_second}."


def complaint(choice: Choice) -> Both:
    (en, de), adjective = noun_phrase(choice.one(("the", "this", "my", "your")), choice.one(lexicon.DISHES), "nom"), choice.one(lexicon.FOOD_FAULTS)
    degree = choice.one((("too", "zu"), ("very", "sehr"), ("a little too", "etwas zu")))
    return f"{en} is {degree[0]} {adjective.en}.", f"{de} ist {degree[1]} {adjective.de}."


def contents(choice: Choice) -> Both:
    noun, (en, de) = choice.one(lexicon.MASS_FOOD), dish(choice, choice.one(("the", "this")), "dat", 0.4)
    return f"is there {noun.en} in {en}?", f"ist {noun.de} {after('in', de)}?"


def abstains(choice: Choice) -> Both:
    subject, eats = choice.subject(), choice.chance(0.5)
    verb, noun = (VERBS["eat"], choice.one(lexicon.MASS_FOOD)) if eats else (VERBS["drink"], choice.one(lexicon.DRINKS))
    de = noun_phrase("no", noun, "acc")[1]
    (en_day, de_day) = choice.weekday()
    does = "does" if subject.person == "3" else "do"
    return f"{subject.en} {does} not {verb.en} {noun.en} on {en_day}.", f"{subject.de} {verb.present(subject.person)} am {de_day} {de}."


def table(choice: Choice) -> Both:
    value, (en_time, de_time), (en_day, de_day) = choice.between(2, 12), choice.time(), choice.weekday()
    people = numbers.number(value)
    if choice.chance(0.5):
        return f"do you have a table for {people[0]} people at {en_time}?", f"haben Sie um {de_time} einen Tisch für {people[1]} Personen?"
    return (
        f"we need a table for {people[0]} people on {en_day} at {en_time}.",
        f"wir brauchen am {de_day} um {de_time} einen Tisch für {people[1]} Personen.",
    )


def price(choice: Choice) -> Both:
    (en, de), (en_price, de_price) = choice.ware(choice.one(("the", "this")), "nom", 0.8), choice.price()
    return f"{en} costs {en_price}.", f"{de} kostet {de_price}."


def price_question(choice: Choice) -> Both:
    (en, de) = choice.ware(choice.one(("the", "this", "your")), "nom", 0.8)
    return f"how much does {en} cost?", f"wie viel kostet {de}?"


def bill(choice: Choice) -> Both:
    (en, de), (en_price, de_price) = dish(choice, "the", "nom", 0.3), choice.price()
    return f"{en} costs {en_price}.", f"{de} kostet {de_price}."


def total(choice: Choice) -> Both:
    en, de = choice.price()
    return f"that is {en} in total.", f"das macht zusammen {de}."


def size(choice: Choice) -> Both:
    noun, adjective = choice.one(lexicon.CLOTHES), choice.one(lexicon.CLOTHES_FAULTS)
    (en, de) = noun_phrase(choice.one(("the", "this")), noun, "nom", choice.one(lexicon.COLOURS) if choice.chance(0.6) else None)
    (en_whom, de_whom) = choice.relative("acc")
    return f"{en} is too {adjective.en} for {en_whom}.", f"{de} ist zu {adjective.de} für {de_whom}."


def pairs(choice: Choice) -> Both:
    """Things in the plural, with and without an article."""
    noun, adjective, fault = choice.one(lexicon.PAIRED_CLOTHES), choice.one(lexicon.COLOURS), choice.one(lexicon.CLOTHES_FAULTS[:4])
    determiner = choice.one(("the", "this", *OWNERS))
    if choice.chance(0.5):
        en, de = noun_phrase(determiner, noun, "nom", adjective, plural=True)
        return f"{en} are too {fault.en}.", f"{de} sind zu {fault.de}."
    subject = choice.subject()
    en, de = noun_phrase("", noun, "acc", adjective, plural=True)
    (en_whom, de_whom) = choice.relative("acc", subject.owner)
    buy = VERBS["buy"]
    return f"{subject.en} {buy.english(subject.person)} {en} for {en_whom}.", f"{subject.de} {buy.present(subject.person)} {de} für {de_whom}."


def colour(choice: Choice) -> Both:
    (en, de), shade = choice.ware("this", "acc", 0), choice.one(lexicon.COLOURS)
    return f"do you also have {en} in {shade.en}?", f"haben Sie {de} auch in {shade.de.capitalize()}?"


def comparison(choice: Choice) -> Both:
    (first, second), (en, de) = choice.two(choice.one((lexicon.CLOTHES, lexicon.THINGS))), choice.one(lexicon.COMPARATIVES)
    shade = choice.one(lexicon.COLOURS) if choice.chance(0.7) else None
    en_first, de_first = noun_phrase("the", first, "nom", shade)
    en_second, de_second = noun_phrase("the", second, "nom")
    return f"{en_first} is {en} than {en_second}.", f"{de_first} ist {de} als {de_second}."


def gift(choice: Choice) -> Both:
    """Two objects: the person in the dative before the thing in the accusative."""
    subject, verb = choice.subject(), choice.one((("give as a present", "gives", "give"), ("show", "shows", "show")))
    (en_whom, de_whom), (en, de) = choice.relative("dat", subject.owner), choice.ware("a", "acc")
    german = VERBS[verb[0]]
    return (
        f"{subject.en} {verb[1] if subject.person == '3' else verb[2]} {en_whom} {en}.",
        f"{subject.de} {german.present(subject.person)} {de_whom} {de}.",
    )


def belongs(choice: Choice) -> Both:
    (en, de), (en_whom, de_whom) = choice.ware("the", "nom", 0.8), choice.relative("dat")
    return f"{en} belongs to {en_whom}.", f"{de} gehört {de_whom}."


def lies(choice: Choice) -> Both:
    """Rest: liegen or stehen with the dative."""
    flat = choice.chance(0.6)
    noun = choice.one(lexicon.FLAT_THINGS if flat else lexicon.UPRIGHT_THINGS)
    (en, de) = noun_phrase(choice.one(("the", *OWNERS)), noun, "nom", choice.one(lexicon.COLOURS) if choice.chance(0.4) else None)
    (en_on, de_on), (en_where, de_where) = choice.one(lexicon.SURFACES), noun_phrase("the", choice.one(lexicon.FURNITURE), "dat")
    return f"{en} is {en_on} {en_where}.", f"{de} {'liegt' if flat else 'steht'} {after(de_on, de_where)}."


def put(choice: Choice) -> Both:
    """Motion: legen or stellen with the accusative."""
    flat = choice.chance(0.6)
    noun = choice.one(lexicon.FLAT_THINGS if flat else lexicon.UPRIGHT_THINGS)
    (en, de) = noun_phrase(choice.one(("the", *OWNERS)), noun, "acc", choice.one(lexicon.COLOURS) if choice.chance(0.4) else None)
    (en_on, de_on), (en_where, de_where) = choice.one(lexicon.SURFACES), noun_phrase("the", choice.one(lexicon.FURNITURE), "acc")
    return f"please put {en} {en_on} {en_where}.", f"bitte {'legen' if flat else 'stellen'} Sie {de} {after(de_on, de_where)}."


def several(choice: Choice) -> Both:
    noun = choice.one(lexicon.FLAT_THINGS + lexicon.UPRIGHT_THINGS)
    (en, de), (en_where, de_where) = counted(numbers.number(choice.amount()), noun, "nom", choice.one(lexicon.THING_ADJECTIVES)), noun_phrase(
        choice.one(("the", "my", "your")), choice.one(lexicon.FURNITURE), "dat"
    )  # fmt: skip
    return f"there are {en} on {en_where}.", f"{after('auf', de_where)} sind {de}."


def that_i_bought(choice: Choice) -> Both:
    """Relative clauses: the pronoun has the gender of the noun and the case of its clause."""
    clothes = choice.chance(0.5)
    noun = choice.one(lexicon.CLOTHES if clothes else lexicon.THINGS)
    subject, verb = choice.one(verbs.PRONOUNS), VERBS[choice.one(("buy", "find", "lose", "see", "need"))]
    en, de = noun_phrase("the", noun, "nom")
    pronoun, adjective = RELATIVE["acc"][noun.gender], choice.one(lexicon.CLOTHES_ADJECTIVES[:11] if clothes else lexicon.THING_ADJECTIVES)
    have = VERBS["have"].present(subject.person)
    return (
        f"{en} that {subject.en} {verb.en_past} is {adjective.en}.",
        f"{de}, {pronoun} {subject.de} {verb.participle} {'hat' if subject.person == '3' else have}, ist {adjective.de}.",
    )


def who(choice: Choice) -> Both:
    person = choice.one(lexicon.PEOPLE)
    en, de = noun_phrase("the", person, "nom", choice.one(lexicon.PERSON_ADJECTIVES) if choice.chance(0.5) else None)
    en_hat, de_hat = noun_phrase("the", choice.one(lexicon.COMMON_CLOTHES), "dat", choice.one(lexicon.COLOURS))
    kin = {"woman": "f", "man": "m"}.get(person.en)
    relatives = [noun for noun in lexicon.MEMBERS if (noun.gender == kin if kin else noun.en in YOUNG[person.en])]
    en_kin, de_kin = noun_phrase(choice.one(("my", "his", "her", "your")), choice.one(relatives), "nom")
    return f"{en} with {en_hat} is {en_kin}.", f"{de} mit {de_hat} ist {de_kin}."


YOUNG = {"girl": ("daughter", "sister", "niece", "granddaughter"), "child": ("son", "daughter", "brother", "sister")}


def wears(choice: Choice) -> Both:
    subject, wear = choice.subject(), VERBS["wear"]
    first, second = choice.two(lexicon.COMMON_CLOTHES)
    en, de = noun_phrase("a", first, "acc", choice.one(lexicon.CLOTHES_ADJECTIVES))
    en_second, de_second = noun_phrase("a", second, "acc", choice.one(lexicon.COLOURS))
    return f"{subject.en} {wear.english(subject.person)} {en} and {en_second}.", f"{subject.de} {wear.present(subject.person)} {de} und {de_second}."


def lost(choice: Choice) -> Both:
    subject, (en_where, de_where) = choice.subject(), choice.place("the", "dat", lexicon.INSIDE_PLACES)
    en, de = choice.ware(subject.owner, "acc")
    has = "has" if subject.person == "3" else "have"
    return f"{subject.en} {has} left {en} in {en_where}.", f"{subject.de} {VERBS['have'].present(subject.person)} {de} {after('in', de_where)} vergessen."


def age(choice: Choice) -> Both:
    (en, de), value = choice.relative("nom"), choice.between(2, 99)
    if choice.chance(0.4):
        first, second = choice.two(verbs.NAMES)
        return (
            f"{first.en} is {numbers.english(value % 15 + 2)} years older than {second.en}.",
            f"{first.de} ist {numbers.german(value % 15 + 2)} Jahre älter als {second.de}.",
        )
    return f"{en} is {numbers.english(value)} years old.", f"{de} ist {numbers.german(value)} Jahre alt."


def works(choice: Choice) -> Both:
    subject, (en_city, de_city), (en, de) = choice.subject(), choice.one(lexicon.CITIES), choice.place("a", "dat", lexicon.WORKPLACES, 0.5)
    live, work = VERBS["live"], VERBS["work"]
    return (
        f"{subject.en} {live.english(subject.person)} in {en_city} and {work.english(subject.person)} in {en}.",
        f"{subject.de} {live.present(subject.person)} in {de_city} und {'arbeiten' if subject.person == 'p' else work.present(subject.person)} in {de}.",
    )


def helps(choice: Choice) -> Both:
    subject, verb = choice.subject(), VERBS["help"]
    (en_whom, de_whom), (en, de) = choice.relative("dat", subject.owner), noun_phrase("the", choice.one(lexicon.ROOM_PARTS), "dat")
    return f"{subject.en} {verb.english(subject.person)} {en_whom} in {en}.", f"{subject.de} {verb.present(subject.person)} {de_whom} {after('in', de)}."


def pet(choice: Choice) -> Both:
    subject, adjective = choice.subject(), choice.one(lexicon.PET_ADJECTIVES)
    animal, have = choice.one(lexicon.PETS), VERBS["have"]
    en, de = noun_phrase("a", animal, "acc", adjective) if choice.chance(0.6) else counted(choice.count(), animal, "acc", adjective)
    return f"{subject.en} {have.english(subject.person)} {en}.", f"{subject.de} {have.present(subject.person)} {de}."


def pain(choice: Choice) -> Both:
    (en, de), (en_day, de_day) = noun_phrase(choice.one(OWNERS), choice.one(lexicon.BODY), "nom"), choice.weekday()
    return f"{en} has hurt since {en_day}.", f"{de} tut seit {de_day} weh."


def mood(choice: Choice) -> Both:
    subject, feeling, (en, de) = choice.subject(), choice.one(lexicon.MOODS), choice.one((("today", "heute"), ("often", "oft"), ("always", "immer")))
    be = {"1": "am", "3": "is"}.get(subject.person, "are")
    en = f"{be} {feeling.en} {en}" if en == "today" else f"{be} {en} {feeling.en}"
    return f"{subject.en} {en}.", f"{subject.de} {VERBS['be'].present(subject.person)} {de} {feeling.de}."


def speaks(choice: Choice) -> Both:
    subject, (en, de), (en_second, de_second) = choice.subject(), *choice.two(lexicon.NATIONAL)
    speak = {"1": "spreche", "3": "spricht"}.get(subject.person, "sprechen")
    return (
        f"{subject.en} {'speaks' if subject.person == '3' else 'speak'} {en} and a little {en_second}.",
        f"{subject.de} {speak} {de} und ein wenig {de_second}.",
    )


def introduce(choice: Choice) -> Both:
    (en, de), (en_city, de_city) = choice.relative("nom"), choice.one(lexicon.CITIES)
    return f"this is {en} from {en_city}.", f"das ist {de} aus {de_city}."


def arithmetic(choice: Choice) -> Both:
    first, second = choice.between(2, 99), choice.between(2, 99)
    (en, de), (en_second, de_second), (en_sum, de_sum) = (numbers.number(value) for value in (first, second, first + second))
    return f"{en} plus {en_second} is {en_sum}.", f"{de} plus {de_second} ist {de_sum}."


def population(choice: Choice) -> Both:
    (en, de), value = choice.place("the", "dat", lexicon.INSIDE_PLACES, 0.3), choice.between(2, 99) * 100 + choice.between(2, 99) * choice.between(0, 1)
    value += value % 100 == 1
    return f"there were {numbers.english(value)} people in {en}.", f"{after('in', de)} waren {numbers.german(value)} Menschen."


def help_with(choice: Choice) -> Both:
    en, de = choice.ware("my", "dat")
    return f"could you help me with {en}, please?", f"könnten Sie mir bitte mit {de} helfen?"


TEMPLATES: tuple[Template, ...] = (
    Template(order, 3),
    Template(order_two, 3),
    Template(order_for, 2),
    Template(market, 3),
    Template(complaint, 1.5),
    Template(contents, 1.5),
    Template(abstains, 1.5),
    Template(table, 2),
    Template(price, 2),
    Template(price_question, 1.5),
    Template(bill, 1.5),
    Template(total, 1),
    Template(size, 2),
    Template(pairs, 2),
    Template(colour, 1.5),
    Template(comparison, 2),
    Template(gift, 3),
    Template(belongs, 2),
    Template(lies, 3),
    Template(put, 3),
    Template(several, 2),
    Template(that_i_bought, 3),
    Template(who, 2),
    Template(wears, 2),
    Template(lost, 2),
    Template(age, 2),
    Template(works, 3),
    Template(helps, 2),
    Template(pet, 2),
    Template(pain, 1.5),
    Template(mood, 1.5),
    Template(speaks, 2),
    Template(introduce, 2),
    Template(arithmetic, 2),
    Template(population, 1.5),
    Template(help_with, 2),
)
