"""Byte-level BPE (Sennrich et al. 2016, on bytes) in plain Python, for where sentencepiece is not installed.

A text gets one space in front, so that a word has the same pieces at the start and in the middle; decoding removes it.
It is cut into words (each with the space before it), a word into UTF-8 bytes, and bytes are merged inside a word only.
Ids: 0-3 special, 4-259 the bytes, then one id a merge in the order of training.
"""

from __future__ import annotations

import heapq
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from cvmk.errors import ConfigError, DataError
from cvmk.text.tokenizers.base import DESCRIPTION, Tokenizer, corrupt, read_normalization, without_surrogates, write_description
from cvmk.text.tokenizers.normalization import IDENTITY, RULES

Pair = tuple[int, int]

BYTE_OFFSET = len(Tokenizer.SPECIAL_PIECES)
FIRST_MERGE = BYTE_OFFSET + 256
CACHED_WORDS = 100_000
MINIMUM_COUNT = 2  # a pair seen once teaches nothing
_LONGEST = 1 << 23  # bytes of all pieces together, beyond any that were learnt: merges of a damaged file may double a piece each time

# The alternatives cover every character, so joining the words gives the text back.
_WORDS = re.compile(r" ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")


class FallbackTokenizer(Tokenizer):
    """Byte-level BPE; `merges` are pairs of ids, in the order in which they apply."""

    kind = "fallback"

    def __init__(self, merges: list[Pair], normalization: str = IDENTITY) -> None:
        self.merges, self.normalization = merges, normalization
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._bytes: list[bytes] = [b""] * BYTE_OFFSET + [bytes([value]) for value in range(256)]
        room = _LONGEST
        for left, right in merges:
            if not (BYTE_OFFSET <= left < len(self._bytes) and BYTE_OFFSET <= right < len(self._bytes)):
                raise ValueError(f"merge {len(self._bytes) - FIRST_MERGE} names pieces that come after it")
            room -= len(self._bytes[left]) + len(self._bytes[right])
            if room < 0:
                raise ValueError(f"its pieces have more than {_LONGEST} bytes together")
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self.pieces = [*self.SPECIAL_PIECES, *("".join(map(_visible, piece)) for piece in self._bytes[BYTE_OFFSET:])]
        self._word = lru_cache(CACHED_WORDS)(self._encode_word)

    def _identity(self) -> Iterable[str]:
        return (f"{left} {right}" for left, right in self.merges)

    def encode(self, text: str) -> list[int]:
        text = self.normalized(text)
        if not text:
            return []
        ids: list[int] = []
        for word in _WORDS.findall(" " + text):
            ids += self._word(word)
        return ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Merge the lowest-ranked pair again and again; a heap keeps long words (spaces, other scripts) fast."""
        ids: list[int] = [BYTE_OFFSET + value for value in word.encode()]
        following = list(range(1, len(ids) + 1))
        previous = list(range(-1, len(ids) - 1))
        ranks = self._ranks
        heap = [(ranks[pair], at) for at, pair in enumerate(zip(ids, ids[1:], strict=False)) if pair in ranks]
        heapq.heapify(heap)
        end = len(ids)
        while heap:
            rank, at = heapq.heappop(heap)
            right = following[at]
            if right >= end or ids[at] < 0 or ranks.get((ids[at], ids[right])) != rank:
                continue
            ids[at] = FIRST_MERGE + rank
            ids[right] = -1
            after = following[at] = following[right]
            if after < end:
                previous[after] = at
                if (new := ranks.get((ids[at], ids[after]))) is not None:
                    heapq.heappush(heap, (new, at))
            before = previous[at]
            if before >= 0 and (new := ranks.get((ids[before], ids[at]))) is not None:
                heapq.heappush(heap, (new, before))
        return tuple(piece for piece in ids if piece >= 0)

    def decode(self, ids: Iterable[int]) -> str:
        text = b"".join([self._bytes[index] for index in self._text_ids(ids)]).decode(errors="replace")
        return text.removeprefix(" ")

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_description(folder, self, merges=[f"{left} {right}" for left, right in self.merges])

    @classmethod
    def load(cls, folder: str | os.PathLike[str], description: dict[str, object]) -> FallbackTokenizer:
        """The tokenizer of a parsed tokenizer.json. Raises DataError where its merges are not sound."""
        path = Path(folder) / DESCRIPTION
        lines = description.get("merges")
        if not isinstance(lines, list) or description.get("vocabulary") != FIRST_MERGE + len(lines):
            raise corrupt(path, "the number of merges does not fit the vocabulary")
        try:
            merges = []
            for line in lines:
                left, right = line.split(" ")
                merges.append((int(left), int(right)))
            return cls(merges, read_normalization(folder, description))
        except (AttributeError, ValueError) as error:
            raise corrupt(path, str(error)) from error


def _visible(value: int) -> str:
    """One printable character for each byte: printable ASCII as itself, every other byte above U+0100."""
    return chr(value) if 33 <= value <= 126 else chr(256 + value)


def train_fallback(texts: Iterable[str], vocabulary: int, seed: int = 0, normalization: str = IDENTITY) -> FallbackTokenizer:
    """Learn merges of normalised text until there are `vocabulary` pieces; ties are broken by the pieces' bytes, so `seed` has no effect.

    Raises ConfigError where the vocabulary is smaller than the bytes or larger than the texts support.
    """
    if vocabulary < FIRST_MERGE:
        raise ConfigError(f'tokenizer.vocabulary = {vocabulary} is too small for tokenizer.kind = "fallback": set it to at least {FIRST_MERGE}')
    counts: Counter[str] = Counter()
    for text in texts:
        if text.strip():
            counts.update(_WORDS.findall(" " + RULES[normalization](without_surrogates(text))))
    if not counts:
        raise DataError("there is no text to train a tokenizer on: check the training corpus")
    merges = _learn(counts, vocabulary - FIRST_MERGE)
    if FIRST_MERGE + len(merges) < vocabulary:
        raise ConfigError(f"tokenizer.vocabulary = {vocabulary} is too large for the training text: set it to {FIRST_MERGE + len(merges)} or less")
    return FallbackTokenizer(merges, normalization)


def _learn(counts: Counter[str], wanted: int) -> list[Pair]:
    """The `wanted` most frequent merges, or fewer where no pair occurs `MINIMUM_COUNT` times any more.

    Pair counts are kept up to date word by word; the heap holds outdated counts, which are put right when they surface.
    """
    words = [[BYTE_OFFSET + value for value in word.encode()] for word in counts]
    frequency = list(counts.values())
    totals: Counter[Pair] = Counter()
    places: dict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            totals[pair] += frequency[index]
            places[pair].add(index)
    spelling: list[bytes] = [b""] * BYTE_OFFSET + [bytes([value]) for value in range(256)]

    def entry(pair: Pair) -> tuple[int, bytes, bytes, Pair]:
        return -totals[pair], spelling[pair[0]], spelling[pair[1]], pair

    heap = [entry(pair) for pair in totals]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < wanted:
        negative, _, _, pair = heapq.heappop(heap)
        if -negative != totals[pair]:
            if totals[pair] >= MINIMUM_COUNT:
                heapq.heappush(heap, entry(pair))
            continue
        if -negative < MINIMUM_COUNT:
            break
        new = FIRST_MERGE + len(merges)
        merges.append(pair)
        spelling.append(spelling[pair[0]] + spelling[pair[1]])
        grown: set[Pair] = set()
        for index in places.pop(pair):
            before = words[index]
            after = _merged(before, pair, new)
            amount = frequency[index]
            for old in zip(before, before[1:], strict=False):
                totals[old] -= amount
            for fresh in zip(after, after[1:], strict=False):
                totals[fresh] += amount
                if new in fresh:
                    places[fresh].add(index)
                    grown.add(fresh)
            words[index] = after
        for fresh in grown:
            heapq.heappush(heap, entry(fresh))
    return merges


def _merged(word: list[int], pair: Pair, new: int) -> list[int]:
    """`word` with each occurrence of `pair`, from the left, replaced by `new`."""
    left, right = pair
    result = []
    position = 0
    last = len(word) - 1
    while position <= last:
        if position < last and word[position] == left and word[position + 1] == right:
            result.append(new)
            position += 2
        else:
            result.append(word[position])
            position += 1
    return result
