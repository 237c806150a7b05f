"""Random choices of phrases, and what a sentence template is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from cvmk.text.phrasebook import lexicon, numbers, verbs
from cvmk.text.phrasebook.grammar import Both, Case, Noun, Subject, noun_phrase

T = TypeVar("T")
OWNERS = ("my", "his", "her", "our", "your", "their")


class Choice:
    """A seeded source of phrases. Each method draws one at random, as (English, German) unless it says otherwise."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def share(self) -> float:
        """A number in [0, 1)."""
        return self._random()

    def one(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def two(self, options: Sequence[T]) -> tuple[T, T]:
        """Two different options."""
        first = int(self._random() * len(options))
        second = int(self._random() * (len(options) - 1))
        return options[first], options[second + (second >= first)]

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self._random() * (high - low + 1))

    def count(self, high: int = 12) -> Both:
        """A number from two on, for things in the plural."""
        return numbers.number(self.between(2, high))

    def amount(self) -> int:
        """A number that stands before a noun: from two on, mostly small, and never ending in one above that."""
        value = self.between(2, 20) if self.chance(0.5) else self.between(21, 99) if self.chance(0.7) else self.between(100, 999)
        return value + 1 if value % 100 == 1 else value

    def price(self) -> Both:
        euros = self.between(1, 20) if self.chance(0.5) else self.between(21, 99) if self.chance(0.7) else 10 * self.between(10, 90)
        return numbers.price(euros, 5 * self.between(2, 19) if euros < 100 and self.chance(0.5) else 0)

    def time(self) -> Both:
        """A clock time without a preposition, official or colloquial."""
        hour = self.between(1, 12)
        if self.chance(0.4):
            return numbers.clock(hour, 5 * self.between(2, 11) if self.chance(0.6) else 0)
        return numbers.colloquial(hour, 5 * self.between(0, 11))

    def weekday(self) -> Both:
        return self.one(numbers.WEEKDAYS)

    def day(self) -> Both:
        """A day as an adverbial, such as "on Monday" or "on the third of May"."""
        if self.chance(0.6):
            en, de = self.weekday()
            return f"on {en}", f"am {de}"
        en, de = self.date("en")
        return f"on the {en}", f"am {de}"

    def date(self, ending: str) -> Both:
        """Day and month; `ending` is the German ordinal's."""
        (en, de), month = numbers.ordinal(self.between(1, 31)), self.one(numbers.MONTHS)
        return f"{en} of {month[0]}", f"{de}{ending} {month[1]}"

    def ware(self, determiner: str, case: Case, adjective: float = 0.6) -> Both:
        """Something to buy, with an adjective at the given probability."""
        if self.chance(0.5):
            noun, adjectives = self.one(lexicon.CLOTHES), lexicon.CLOTHES_ADJECTIVES
        else:
            noun, adjectives = self.one(lexicon.THINGS), lexicon.THING_ADJECTIVES
        return noun_phrase(determiner, noun, case, self.one(adjectives) if self.chance(adjective) else None)

    def place(self, determiner: str, case: Case, places: Sequence[Noun] = lexicon.PLACES, adjective: float = 0.2) -> Both:
        return noun_phrase(determiner, self.one(places), case, self.one(lexicon.PLACE_ADJECTIVES) if self.chance(adjective) else None)

    def relative(self, case: Case, owner: str | None = None) -> Both:
        """A member of the family: "my mother"."""
        owner = owner or self.one(OWNERS)
        return noun_phrase(owner, self.member(owner), case)

    def member(self, owner: str) -> Noun:
        """Somebody whom the owner can have: a wife or a husband has one person."""
        return self.one(lexicon.MEMBERS if owner in ("my", "his", "her", "your") else lexicon.SHARED_MEMBERS)

    def subject(self) -> Subject:
        """A pronoun, a name, or members of a family."""
        if self.chance(0.5):
            return self.one(verbs.PRONOUNS)
        return self.other()

    def other(self) -> Subject:
        """A name or members of a family: a subject that is not a pronoun."""
        if self.chance(0.35):
            return self.one(verbs.NAMES)
        if self.chance(0.2):
            en, de = noun_phrase(self.one(OWNERS), self.one(lexicon.GROUPS), "nom", plural=True)
            return Subject(en, de, "p", "their")
        owner = self.one(OWNERS)
        member = self.member(owner)
        en, de = noun_phrase(owner, member, "nom")
        return Subject(en, de, "3", "her" if member.gender == "f" else "his")


class Template(NamedTuple):
    """A shape of sentences; `weight` is its share of them. `say` gives the text without capitals."""

    say: Callable[[Choice], Both]
    weight: float
