"""When to read more of a text before it is translated, and how much of a translation to say.

A policy decides in words, as they are written. What it commits is said for good: every later translation of the sentence begins with it. What it shows
beyond that is tentative, and may be taken back. At the end of a sentence all of its translation is committed, whatever the policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from cvmk.errors import ConfigError


class View(NamedTuple):
    """What a policy knows of a sentence that has not ended."""

    source_words: int
    """How many words of it have been read."""
    committed: int
    """How many words of its translation have been said for good."""
    words: tuple[str, ...]
    """Its translation as it is now, the committed words included; none before it is translated."""
    earlier: Sequence[tuple[str, ...]]
    """Its translations before, of fewer words each, the latest one last; as many as the policy's `memory` where there are."""


class Write(NamedTuple):
    """How many words of the translation are committed, and how many are to be seen, these included."""

    commit: int
    show: int


class Policy(ABC):
    """What `Stream` asks."""

    @property
    def memory(self) -> int:
        """How many earlier translations it looks at."""
        return 0

    def reads(self, view: View) -> bool:
        """Whether to read on, and not even to translate what has been read."""
        return False

    @abstractmethod
    def writes(self, view: View) -> Write:
        """What is said of a new translation. Counts below what is committed already, or above the words there are, mean those."""


@dataclass(frozen=True)
class Retranslation(Policy):
    """Shows every translation but for its last `mask` words, which change most, and commits nothing before the end of the sentence.

    Arivazhagan et al. 2020, "Re-translation versus streaming for simultaneous translation". With mask 0 everything is seen, and flickers.
    """

    mask: int = 2

    def __post_init__(self) -> None:
        _check("mask", self.mask, 0)

    def writes(self, view: View) -> Write:
        return Write(view.committed, len(view.words) - self.mask)


@dataclass(frozen=True)
class LocalAgreement(Policy):
    """Commits the words with which the last `agreeing` translations begin alike; shows the rest but for its last `mask` words.

    Liu et al. 2020, "Low-latency sequence-to-sequence speech recognition and translation by partial hypothesis selection"; agreeing = 2 there.
    """

    agreeing: int = 2
    mask: int = 0

    def __post_init__(self) -> None:
        _check("agreeing", self.agreeing, 1)
        _check("mask", self.mask, 0)

    @property
    def memory(self) -> int:
        return self.agreeing - 1

    def writes(self, view: View) -> Write:
        show = len(view.words) - self.mask
        if len(view.earlier) < self.memory:
            return Write(view.committed, show)
        return Write(_common(view.words, *view.earlier), show)


@dataclass(frozen=True)
class WaitK(Policy):
    """Says its first word when `k` words have been read, and one more for every further one; nothing is tentative.

    Ma et al. 2019, "STACL: simultaneous translation with implicit anticipation and controllable latency": target word t follows source word t + k - 1.
    """

    k: int = 3

    def __post_init__(self) -> None:
        _check("k", self.k, 1)

    def reads(self, view: View) -> bool:
        return self._due(view) <= view.committed

    def writes(self, view: View) -> Write:
        return Write(self._due(view), self._due(view))

    def _due(self, view: View) -> int:
        return view.source_words - self.k + 1


def _common(*translations: Sequence[str]) -> int:
    """How many words all of them begin with."""
    return sum(1 for _ in takewhile(lambda alike: len(set(alike)) == 1, zip(*translations, strict=False)))


def _check(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}, and must be a whole number of at least {least}")
