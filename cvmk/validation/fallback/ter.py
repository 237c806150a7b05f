"""Translation edit rate (Snover et al. 2006): word edits and block shifts that turn the hypothesis into the reference, per reference word.

The best sequence of shifts is NP-hard to find; the number that everybody reports is what the greedy search of the tool tercom finds.
Its limits and tie-breaks, as sacrebleu has them, are therefore part of the metric.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cvmk.validation.fallback.bleu import marks_apart, symbols_apart, unescaped

LONGEST_SHIFT = 10
"""Words in a block."""
FARTHEST_SHIFT = 50
"""Positions between a block in the hypothesis and its match in the reference."""
MOST_CANDIDATES = 1000
"""Shifts tried for one sentence."""
BAND = 25
"""Half width of the band of the edit table that is looked at."""

_UNREACHED = 1 << 50
_ASIAN = re.compile(  # ideographs, radicals, strokes, compatibility and enclosed forms; punctuation marks of normal, half and full width
    "([\u2e80-\u2eff\u3001\u3002\u3008-\u3011\u3014-\u301f\u30fb\u31c0-\u31ef\u3200-\u4dbf\u4e00-\u9fff\uf900-\ufaff\ufe30-\ufe4f"
    "\uff01\uff02\uff08\uff09\uff0c\uff0e\uff1a\uff1b\uff1f\uff61-\uff65])"
)


def tokenize(line: str) -> list[str]:
    """Lower-cased words, split at white space, as tercom does by default."""
    return line.lower().split()


def tokenize_asian(line: str) -> list[str]:
    """Lower-cased words, punctuation marks, and ideographs each by itself: tercom with normalisation and Asian support. Kana stay together."""
    line = unescaped(line.lower().replace("\n-", "").replace("\n", " "))
    line = marks_apart(symbols_apart(f" {line} ").replace("'s ", " 's "))
    return _ASIAN.sub(r" \1 ", line).split()


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"tercom": tokenize, "asian": tokenize_asian}


class _Bits:
    """Edit distances to one reference by bit-parallel dynamic programming (Hyyrö 2003), resumable after any hypothesis prefix.

    Bit j of the two vectors of a state says whether column j+1 of the current row is one more, or one less, than column j.
    """

    def __init__(self, reference: Sequence[str]) -> None:
        self.size = len(reference)
        self.mask = (1 << self.size) - 1
        self.positions: dict[str, int] = {}
        for place, word in enumerate(reference):
            self.positions[word] = self.positions.get(word, 0) | (1 << place)

    def states(self, words: Sequence[str]) -> list[tuple[int, int, int]]:
        """The state after each prefix of `words`, the empty one first."""
        states = [(self.mask, 0, self.size)]
        for word in words:
            states.append(self.advance(states[-1], (word,)))
        return states

    def advance(self, state: tuple[int, int, int], words: Sequence[str]) -> tuple[int, int, int]:
        up, down, distance = state
        mask, last = self.mask, 1 << (self.size - 1)
        for word in words:
            equal = self.positions.get(word, 0)
            diagonal = (((equal & up) + up) ^ up) | equal | down
            right_up = down | (mask & ~(diagonal | up))
            right_down = diagonal & up
            if right_up & last:
                distance += 1
            elif right_down & last:
                distance -= 1
            right_up = (right_up << 1) | 1
            up = ((right_down << 1) | ~(diagonal | right_up)) & mask
            down = diagonal & right_up & mask
        return up, down, distance


class _Table:
    """The banded edit table of one reference and hypotheses of one length; rows are resumable after any hypothesis prefix."""

    def __init__(self, reference: Sequence[str], length: int) -> None:
        self.reference = reference
        self.length = length
        self.ratio = len(reference) / length if length else 1.0
        self.band = math.ceil(self.ratio / 2 + BAND) if self.ratio / 2 > BAND else BAND

    def first(self) -> list[int]:
        return list(range(len(self.reference) + 1))

    def next(self, above: list[int], place: int, word: str) -> list[int]:
        """Row `place` (counted from 1) from the row above it: `word` is the hypothesis word between them."""
        columns = len(self.reference) + 1
        centre = math.floor(place * self.ratio)
        start = max(0, centre - self.band)
        stop = columns if place == self.length else min(columns, centre + self.band)
        row = [_UNREACHED] * columns
        if start == 0:
            row[0] = above[0] + 1
        for column in range(max(start, 1), stop):
            keep = above[column - 1] + (word != self.reference[column - 1])
            row[column] = min(keep, above[column] + 1, row[column - 1] + 1)
        return row

    def rows(self, words: Sequence[str]) -> list[list[int]]:
        rows = [self.first()]
        for place, word in enumerate(words, 1):
            rows.append(self.next(rows[-1], place, word))
        return rows

    def distance(self, rows: list[list[int]], words: Sequence[str], start: int) -> int:
        """Distance of `words`, which share their first `start` words with those that `rows` were made for."""
        row = rows[start]
        for place in range(start + 1, self.length + 1):
            row = self.next(row, place, words[place - 1])
        return row[-1]


@dataclass
class _Alignment:
    """What the edit path says about each word; `anchor[j]` is the hypothesis position that reference word j stands at."""

    wrong_hypothesis: list[bool]
    wrong_reference: list[bool]
    anchor: list[int]


def _align(rows: list[list[int]], words: Sequence[str], reference: Sequence[str]) -> _Alignment:
    """Follow the edit path back. Of equally cheap steps keep or substitute comes first, then the drop of a hypothesis word."""
    result = _Alignment([True] * len(words), [True] * len(reference), [-1] * len(reference))
    i, j = len(words), len(reference)
    while i or j:
        here = rows[i][j]
        same = i > 0 and j > 0 and words[i - 1] == reference[j - 1]
        if i and j and here == rows[i - 1][j - 1] + (not same):
            i, j = i - 1, j - 1
            result.anchor[j] = i
            result.wrong_hypothesis[i] = result.wrong_reference[j] = not same
        elif i and here == rows[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
            result.anchor[j] = i - 1
    return result


def _matches(words: Sequence[str], reference: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Every (start in the hypothesis, start in the reference, length) of equal blocks within the limits."""
    starts: dict[str, list[int]] = {}
    for place, word in enumerate(reference):
        starts.setdefault(word, []).append(place)
    for start, word in enumerate(words):
        for target in starts.get(word, ()):
            if abs(target - start) > FARTHEST_SHIFT:
                continue
            longest = min(LONGEST_SHIFT, len(words) - start, len(reference) - target)
            length = 1
            while True:
                yield start, target, length
                if length == longest or words[start + length] != reference[target + length]:
                    break
                length += 1


def _moved(words: list[str], start: int, length: int, target: int) -> list[str]:
    """`words` with the block at `start` moved so that it stands before what was word `target`; inside itself, `length` later."""
    block, rest = words[start : start + length], words[:start] + words[start + length :]
    if target > start + length:
        target -= length
    return rest[:target] + block + rest[target:]


def _candidates(words: list[str], reference: Sequence[str], alignment: _Alignment) -> Iterator[tuple[int, int, int]]:
    """Shifts worth trying: (start, length, target). Both sides must have an error, and the block may not move within itself."""
    for start, target, length in _matches(words, reference):
        needed = any(alignment.wrong_hypothesis[start : start + length]) and any(alignment.wrong_reference[target : target + length])
        if not needed or start <= alignment.anchor[target] < start + length:
            continue
        last = -1
        for place in range(target - 1, target + length):
            position = 0 if place < 0 else alignment.anchor[place] + 1
            if position != last:
                yield start, length, position
                last = position


class _Search:
    """The greedy search for one sentence pair."""

    def __init__(self, hypothesis: list[str], reference: list[str]) -> None:
        self.reference = reference
        self.table = _Table(reference, len(hypothesis))
        self.bits = _Bits(reference) if len(reference) < BAND else None  # only where the band covers the whole table
        self.tried = 0

    def best_shift(self, words: list[str], rows: list[list[int]]) -> tuple[int, list[str]]:
        """Edits saved by the best shift and the words after it. Ties: longest block, then leftmost block, then leftmost target."""
        best: tuple[int, int, int, int] | None = None
        best_words = words
        states = self.bits.states(words) if self.bits else []
        for start, length, target in _candidates(words, self.reference, _align(rows, words, self.reference)):
            moved = _moved(words, start, length, target)
            same = min(start, target)
            distance = self.bits.advance(states[same], moved[same:])[2] if self.bits else self.table.distance(rows, moved, same)
            candidate = (rows[-1][-1] - distance, length, -start, -target)
            if best is None or candidate > best:
                best, best_words = candidate, moved
            self.tried += 1
            if self.tried >= MOST_CANDIDATES:  # tercom then ends the search and keeps none of this round's shifts
                return 0, words
        return (best[0] if best else 0), best_words

    def edits(self, words: list[str]) -> int:
        shifts = 0
        while True:
            rows = self.table.rows(words)
            saved, shifted = self.best_shift(words, rows)
            if saved <= 0:
                return shifts + rows[-1][-1]
            words, shifts = shifted, shifts + 1


def edits(hypothesis: list[str], reference: list[str]) -> int:
    """Number of insertions, deletions, substitutions and block shifts, 1 each, that the greedy search finds."""
    return _Search(hypothesis, reference).edits(hypothesis) if reference else len(hypothesis)


def statistics(hypotheses: Sequence[str], reference_sets: Sequence[Sequence[str]], tokenize: Callable[[str], list[str]] = tokenize) -> np.ndarray:
    """Per sentence: fewest edits to any reference, mean length of the references in words."""
    rows = np.zeros((len(hypotheses), 2))
    for row, hypothesis, *references in zip(rows, hypotheses, *reference_sets, strict=True):
        words = tokenize(hypothesis)
        targets = [tokenize(reference) for reference in references]
        row[0] = min(edits(words, target) for target in targets)
        row[1] = sum(map(len, targets)) / len(targets)
    return rows


def value(sums: np.ndarray) -> np.ndarray:
    """TER in percent from summed statistics; it exceeds 100 where there are more edits than reference words."""
    sums = np.asarray(sums, dtype=np.float64)
    count, length = sums[..., 0], sums[..., 1]
    return 100.0 * np.where(length > 0, count / np.where(length > 0, length, 1.0), np.minimum(count, 1.0))


def signature(references: int, tokenizer: str = "tercom") -> str:
    asian = "yes" if tokenizer == "asian" else "no"
    return f"nrefs:{references}|case:lc|tok:tercom|norm:{asian}|punct:yes|asian:{asian}"
