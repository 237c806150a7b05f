"""A few sentences that stand for a corpus of any size, chosen in one pass with bounded memory.

    coverage  the sentences of a uniform sample of the corpus' distinct n-grams (`ops.CVMSketch`, Knuth's Algorithm D), each with the last sentence that it
              was seen in; of these greedily the one with most sampled n-grams that no chosen one has. What is rare counts as much as what is frequent:
              for ranges, which hang on the largest values.
    random    a uniform sample of the sentences (a reservoir, Vitter 1985): for means, such as second moments, which are expectations over what occurs.
    mix       half and half.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cvmk.errors import ConfigError
from cvmk.ops import CVMSketch
from cvmk.text.lines import trimmed

Kind = Literal["coverage", "random", "mix"]
UNITS = 8
"""Sampled n-grams for each sentence that is wanted."""
_BLOCK = 512  # lines that are read at a time
_WORDS = 256  # of a line whose n-grams are looked at


@dataclass(frozen=True)
class Coreset:
    """The chosen sentences in the order of the corpus, as (line from 1, text); lines that were read and had content; the estimated number of distinct
    n-grams in them; the share of the sampled n-grams that the chosen sentences have. The last two are None for a random choice."""

    sentences: list[tuple[int, str]]
    lines: int
    distinct: float | None
    covered: float | None


def choose(lines: Iterable[str], count: int, kind: Kind = "mix", *, orders: Sequence[int] = (1, 2, 3), seed: int = 0) -> Coreset:
    """Choose `count` sentences, or as many as there are; `orders` are the lengths of n-grams of words. The same seed chooses the same.

    Raises ConfigError for numbers below 1 and for an unknown kind.
    """
    if count < 1 or not orders or min(orders) < 1:
        raise ConfigError(f"count is {count} and orders are {list(orders)}: both must be 1 or more")
    if kind not in get_args(Kind):
        raise ConfigError(f"kind is {kind!r}, and must be one of {', '.join(get_args(Kind))}")
    reservoir = _Reservoir(count, seed)
    units = None if kind == "random" else _Units(UNITS * count, orders, seed)
    block: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        text = trimmed(line)
        if not text:
            continue
        reservoir.add((number, text))
        block.append((number, text))
        if units is not None and len(block) == _BLOCK:
            units.add(block)
            block = []
        elif units is None:
            block = []
    if units is None:
        return Coreset(sorted(reservoir.kept), reservoir.seen, None, None)
    units.add(block)
    wanted = count if kind == "coverage" else (count + 1) // 2
    chosen = dict(units.cover(wanted))
    for number, text in (*reservoir.kept, *units.sentences()):
        if len(chosen) < count:
            chosen.setdefault(number, text)
    return Coreset(sorted(chosen.items()), reservoir.seen, units.estimate(), units.covered(chosen.values()))


class _Reservoir:
    """Algorithm R; the kept sentences stand in random order."""

    def __init__(self, count: int, seed: int) -> None:
        self.kept: list[tuple[int, str]] = []
        self.seen, self._count, self._random = 0, count, random.Random(seed)

    def add(self, sentence: tuple[int, str]) -> None:
        self.seen += 1
        place = self._random.randrange(self.seen)
        if len(self.kept) < self._count:
            self.kept.append(sentence)
            self.kept[place], self.kept[-1] = self.kept[-1], self.kept[place]
        elif place < self._count:
            self.kept[place] = sentence


class _Units:
    """A sample of the distinct n-grams of a stream of sentences, each with the last sentence that has it."""

    def __init__(self, capacity: int, orders: Sequence[int], seed: int) -> None:
        self._sketch = CVMSketch(capacity, seed=seed)
        self._orders = sorted(set(orders))
        self._last: dict[bytes, tuple[int, str]] = {}

    def add(self, sentences: Sequence[tuple[int, str]]) -> None:
        """What is in the sample behind a block was in it before, or occurs in the block."""
        seen: dict[bytes, tuple[int, str]] = {}
        for sentence in sentences:
            units = list(self._ngrams(sentence[1]))
            self._sketch.add_bytes(units)
            seen.update(dict.fromkeys(units, sentence))
        self._last = {unit: seen.get(unit) or self._last[unit] for unit in self._sample()}

    def cover(self, count: int) -> list[tuple[int, str]]:
        """At most `count` sentences, each time the one with most units that are not covered yet."""
        left = {sentence: {unit for unit in self._ngrams(sentence[1]) if unit in self._last} for sentence in self.sentences()}
        found: list[tuple[int, str]] = []
        while left and len(found) < count:
            best = max(left, key=lambda sentence: (len(left[sentence]), -sentence[0]))
            new = left.pop(best)
            found.append(best)
            for units in left.values():
                units -= new
        return found

    def sentences(self) -> list[tuple[int, str]]:
        """Those of the sampled units, each once."""
        return list(dict.fromkeys(self._last.values()))

    def covered(self, texts: Iterable[str]) -> float:
        """The share of the sampled units that some texts have."""
        found = {unit for text in texts for unit in self._ngrams(text) if unit in self._last}
        return len(found) / max(1, len(self._last))

    def estimate(self) -> float:
        return self._sketch.estimate()

    def _sample(self) -> list[bytes]:
        sample = self._sketch.sample()
        return sample if isinstance(sample, list) else []

    def _ngrams(self, text: str) -> Iterator[bytes]:
        words = text.split()[:_WORDS]
        for order in self._orders:
            for start in range(len(words) - order + 1):
                yield " ".join(words[start : start + order]).encode("utf-8", "surrogatepass")
