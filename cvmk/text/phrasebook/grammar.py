"""German and English grammar for the phrasebook: noun phrases by case, number and gender, contractions, verb forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Case = Literal["nom", "acc", "dat"]
Both = tuple[str, str]  # the same phrase in English and in German


@dataclass(frozen=True)
class Noun:
    """`gender` is "m", "f" or "n"; `plural` and `en_plural` are the forms of the nominative."""

    en: str
    en_plural: str
    de: str
    gender: str
    plural: str


@dataclass(frozen=True)
class Adjective:
    """`stem` takes the endings; `de` is the form without one."""

    en: str
    de: str
    stem: str


@dataclass(frozen=True)
class Subject:
    """A sentence's subject. `person` is "1" (ich), "3" (er, sie, es) or "p" (wir, sie, Sie); `owner` its possessive."""

    en: str
    de: str
    person: str
    owner: str


@dataclass(frozen=True)
class Verb:
    """German present of ich, er and wir, particle of a separable verb, past participle with its auxiliary; English forms."""

    en: str
    en_third: str
    en_past: str
    first: str
    third: str
    infinitive: str
    particle: str
    participle: str
    auxiliary: str

    def present(self, person: str) -> str:
        """The finite form without the particle."""
        return {"1": self.first, "3": self.third}.get(person, self.infinitive.removeprefix(self.particle))

    def joined(self, person: str) -> str:
        """The finite form at the end of a subordinate clause, where the particle joins it again."""
        return self.particle + self.present(person)

    def zu(self) -> str:
        """The infinitive with zu, which stands inside a separable verb."""
        return f"{self.particle}zu{self.infinitive.removeprefix(self.particle)}" if self.particle else f"zu {self.infinitive}"

    def english(self, person: str) -> str:
        return self.en_third if person == "3" else self.en


_DEFINITE = {
    "nom": {"m": "der", "f": "die", "n": "das", "p": "die"},
    "acc": {"m": "den", "f": "die", "n": "das", "p": "die"},
    "dat": {"m": "dem", "f": "der", "n": "dem", "p": "den"},
}
_DIES = {
    "nom": {"m": "er", "f": "e", "n": "es", "p": "e"},
    "acc": {"m": "en", "f": "e", "n": "es", "p": "e"},
    "dat": {"m": "em", "f": "er", "n": "em", "p": "en"},
}
_EIN = {
    "nom": {"m": "", "f": "e", "n": "", "p": "e"},
    "acc": {"m": "en", "f": "e", "n": "", "p": "e"},
    "dat": {"m": "em", "f": "er", "n": "em", "p": "en"},
}
_WEAK = {
    "nom": {"m": "e", "f": "e", "n": "e", "p": "en"},
    "acc": {"m": "en", "f": "e", "n": "e", "p": "en"},
    "dat": {"m": "en", "f": "en", "n": "en", "p": "en"},
}
_MIXED = {
    "nom": {"m": "er", "f": "e", "n": "es", "p": "en"},
    "acc": {"m": "en", "f": "e", "n": "es", "p": "en"},
    "dat": {"m": "en", "f": "en", "n": "en", "p": "en"},
}
_STRONG = _DIES  # without an article the adjective takes the endings of dieser

# English determiner -> German stem. The ein-words share one set of endings, dieser and welcher another.
EIN_WORDS = {"a": "ein", "no": "kein", "my": "mein", "his": "sein", "her": "ihr", "its": "sein", "our": "unser", "your": "Ihr", "their": "ihr"}
DIES_WORDS = {"this": "dies", "which": "welch"}
RELATIVE = _DEFINITE  # in the nominative, accusative and dative singular the relative pronoun looks like the article

_CONTRACTIONS = {
    ("an", "dem"): "am", ("in", "dem"): "im", ("zu", "dem"): "zum", ("zu", "der"): "zur", ("von", "dem"): "vom",
    ("bei", "dem"): "beim", ("in", "das"): "ins", ("an", "das"): "ans",
}  # fmt: skip


def noun_form(noun: Noun, case: Case, plural: bool) -> str:
    if not plural:
        return noun.de
    if case == "dat" and not noun.plural.endswith(("n", "s")):
        return noun.plural + "n"
    return noun.plural


def noun_phrase(determiner: str, noun: Noun, case: Case, adjective: Adjective | None = None, plural: bool = False) -> Both:
    """English and German noun phrase. `determiner` is English: "the", "a", "this", "which", "my", ..., or "" for none."""
    return (
        _english_phrase(determiner, noun, adjective, plural),
        _german_phrase(determiner, noun, case, adjective, plural),
    )


def counted(number: Both, noun: Noun, case: Case, adjective: Adjective | None = None) -> Both:
    """A number above one with a noun: the adjective is strong, as without an article."""
    en, de = noun_phrase("", noun, case, adjective, plural=True)
    return f"{number[0]} {en}", f"{number[1]} {de}"


def _english_phrase(determiner: str, noun: Noun, adjective: Adjective | None, plural: bool) -> str:
    words = noun.en_plural if plural else noun.en
    if adjective:
        words = f"{adjective.en} {words}"
    if determiner == "a":
        return words if plural else with_article(words)
    if determiner == "this" and plural:
        return f"these {words}"
    return f"{determiner} {words}" if determiner else words


def with_article(words: str) -> str:
    """`words` after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' and not words.startswith(('uni', 'eu', 'one')) else 'a'} {words}"


def _german_phrase(determiner: str, noun: Noun, case: Case, adjective: Adjective | None, plural: bool) -> str:
    gender = "p" if plural else noun.gender
    endings = _STRONG
    article = ""
    if determiner == "the":
        article, endings = _DEFINITE[case][gender], _WEAK
    elif determiner in DIES_WORDS:
        article, endings = DIES_WORDS[determiner] + _DIES[case][gender], _WEAK
    elif determiner in EIN_WORDS and not (determiner == "a" and plural):
        article, endings = EIN_WORDS[determiner] + _EIN[case][gender], _MIXED
    words = noun_form(noun, case, plural)
    if adjective:
        words = f"{adjective.stem}{endings[case][gender]} {words}"
    return f"{article} {words}" if article else words


def after(preposition: str, phrase: str) -> str:
    """A German noun phrase behind a preposition, contracted where German contracts: "zu", "dem Bahnhof" -> "zum Bahnhof"."""
    article, _, rest = phrase.partition(" ")
    contracted = _CONTRACTIONS.get((preposition, article))
    return f"{contracted} {rest}" if contracted else f"{preposition} {phrase}"


def sentence(text: str) -> str:
    """`text` with its first letter capitalised."""
    return text[0].upper() + text[1:]
