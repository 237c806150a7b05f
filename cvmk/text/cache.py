"""Tokenised parallel text on disk, memory-mapped.

One file a corpus: magic, lengths of the parts, a JSON description, then `rows` (int64 [n], index of each pair in the
corpus it was made from), `offsets` (int64 [2n + 1]) and the ids (uint16, or int32 for large vocabularies) of
source 0, target 0, source 1, ... A checksum over everything after the magic finds truncation and damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from cvmk.errors import DataError
from cvmk.files import atomic
from cvmk.text.corpus import CorpusReport, ParallelCorpus
from cvmk.text.tokenizers import Tokenizer

MAGIC = b"cvmktok1"
HEADER = struct.Struct("<8sIIQQ")  # magic, checksum of the rest, bytes of the description, pairs, ids
CHUNK = 4096


class TokenizedCorpus:
    """Pairs of piece ids, without special ids; `[i]` gives two int32 arrays.

    `lengths` int32 [n, 2] counts each side's ids, `rows` int64 [n] is each pair's index in the original corpus, and
    `report` counts the pairs that were left out.
    """

    def __init__(self, rows: np.ndarray, offsets: np.ndarray, ids: np.ndarray, report: CorpusReport) -> None:
        self.rows = rows
        self.report = report
        self._offsets = offsets
        self._ids = ids
        self.lengths: np.ndarray = np.diff(offsets).astype(np.int32).reshape(-1, 2)

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> TokenizedCorpus:
        """Of piece ids that are in memory, and stay there."""
        sides = [side for pair in pairs for side in pair]
        offsets = np.zeros(len(sides) + 1, np.int64)
        np.cumsum([len(side) for side in sides], out=offsets[1:])
        ids = np.fromiter((piece for side in sides for piece in side), np.int32, int(offsets[-1]))
        return cls(np.arange(len(pairs)), offsets, ids, CorpusReport(len(pairs), len(pairs)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"pair {index} of a corpus of {len(self.rows)}")
        start, middle, end = self._offsets[2 * index : 2 * index + 3]
        return self._ids[start:middle].astype(np.int32), self._ids[middle:end].astype(np.int32)

    def padded(self, indices: Sequence[int] | np.ndarray, side: int, start: int, width: int, fill: int) -> np.ndarray:
        """The ids of one side (0 source, 1 target) of the pairs `indices`, int64 [len(indices), width]: each row's from column `start` on, else `fill`.

        Raises IndexError for a pair that is not there and ValueError where a row does not fit.
        """
        rows = np.asarray(indices, np.int64).reshape(-1)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.rows)):
            raise IndexError(f"pairs {rows.min()} to {rows.max()} of a corpus of {len(self.rows)}")
        begins, sizes = self._offsets[2 * rows + side], self.lengths[rows, side]
        if len(rows) and start + sizes.max() > width:
            raise ValueError(f"{sizes.max()} ids do not fit into {width} columns from column {start} on")
        found = np.full((len(rows), width), fill, np.int64)
        columns = np.arange(width - start)
        real = columns < sizes[:, None]
        found[:, start:][real] = self._ids[(begins[:, None] + columns)[real]]
        return found


def tokenized(
    corpus: ParallelCorpus,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    max_tokens: int,
    max_ratio: float = 0.0,
    on_bad_line: Literal["error", "skip"] = "error",
) -> TokenizedCorpus:
    """`corpus` in piece ids, from the cache in `folder` where it is there and whole, else made and written.

    A training pair is over-long where a side has more than `max_tokens` ids, or where the sides' lengths differ by
    more than the factor `max_ratio` (0 = no limit); it is an error or skipped with a count, as `on_bad_line` says.
    Raises DataError for the first over-long pair (`error`), where none is left (`skip`), or where `folder` cannot be
    written.
    """
    path = Path(folder) / f"{_key(corpus, tokenizer, max_tokens, max_ratio, on_bad_line)}.tokens"
    found = _read(path)
    if found is None:
        _write(path, *_encode(corpus, tokenizer, max_tokens, max_ratio, on_bad_line))
        found = _read(path)
        if found is None:
            raise DataError(f"the tokenised corpus {path} was damaged while it was written: check the disk, or name another folder in data.cache")
    return found


def _key(corpus: ParallelCorpus, tokenizer: Tokenizer, *limits: object) -> str:
    return hashlib.sha256(repr((tokenizer.fingerprint, corpus.fingerprints, limits)).encode()).hexdigest()[:32]


def _encode(
    corpus: ParallelCorpus, tokenizer: Tokenizer, max_tokens: int, max_ratio: float, on_bad_line: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, CorpusReport]:
    """Rows, offsets, ids and report of the pairs that are within the limits."""
    report = CorpusReport(read=len(corpus))
    rows: list[int] = []
    lengths: list[int] = []
    parts: list[np.ndarray] = []
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    for start in range(0, len(corpus), CHUNK):
        sources = tokenizer.encode_many(corpus.sources[start : start + CHUNK])
        targets = tokenizer.encode_many(corpus.targets[start : start + CHUNK])
        flat: list[int] = []
        for row, (source, target) in enumerate(zip(sources, targets, strict=True), start):
            if problem := over_long(len(source), len(target), max_tokens, max_ratio):
                kind, numbers, key = problem
                if on_bad_line == "error":
                    raise DataError(f'{corpus.where(row)}: {kind} ({numbers}); raise {key}, or set data.on_bad_line = "skip" to leave such pairs out')
                report.add(kind, corpus.where(row))
                continue
            rows.append(row)
            lengths += (len(source), len(target))
            flat += source
            flat += target
        parts.append(np.array(flat, dtype))
    report.kept = len(rows)
    if not rows:
        raise DataError(f"{corpus.name} has no pair within data.max_tokens_per_sentence = {max_tokens} and data.max_length_ratio = {max_ratio}: raise them")
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return np.array(rows, np.int64), offsets, np.concatenate(parts), report


def over_long(source: int, target: int, max_tokens: int, max_ratio: float) -> tuple[str, str, str] | None:
    """Kind, numbers and key where a pair is over-long, else None."""
    if max(source, target) > max_tokens:
        return "over-long pair", f"{source} and {target} tokens, at most {max_tokens}", "data.max_tokens_per_sentence"
    if max_ratio and max(source, target) > max_ratio * min(source, target):
        return "over-long pair by ratio", f"{source} to {target} tokens, at most a factor of {max_ratio:g}", "data.max_length_ratio"
    return None


def _write(path: Path, rows: np.ndarray, offsets: np.ndarray, ids: np.ndarray, report: CorpusReport) -> None:
    text = json.dumps({"dtype": ids.dtype.name, "read": report.read, "problems": report.problems, "examples": report.examples}).encode()
    text += b" " * (-(HEADER.size + len(text)) % 8)  # the arrays start at a multiple of 8 bytes
    rest = [struct.pack("<IQQ", len(text), len(rows), len(ids)), text, rows.tobytes(), offsets.tobytes(), ids.tobytes()]
    checksum = 0
    for part in rest:
        checksum = zlib.crc32(part, checksum)
    with atomic(path) as file:
        file.write(HEADER.pack(MAGIC, checksum, len(text), len(rows), len(ids)))
        for part in rest[1:]:
            file.write(part)


def _read(path: Path) -> TokenizedCorpus | None:
    """The file, memory-mapped; None where it is missing or not whole."""
    with contextlib.suppress(OSError, ValueError, KeyError, struct.error):
        memory = np.memmap(path, np.uint8, "r")
        magic, checksum, text_size, pairs, count = HEADER.unpack_from(memory[: HEADER.size].tobytes())
        start = HEADER.size + text_size
        if magic != MAGIC or zlib.crc32(memory[12:].data) != checksum:
            return None
        description = json.loads(memory[HEADER.size : start].tobytes())
        rows = memory[start : start + 8 * pairs].view(np.int64)
        offsets = memory[start + 8 * pairs : start + 8 * (3 * pairs + 1)].view(np.int64)
        ids = memory[start + 8 * (3 * pairs + 1) :].view(description["dtype"])
        if len(ids) != count:
            return None
        report = CorpusReport(description["read"], pairs)
        report.problems.update(description["problems"])
        report.examples.extend(description["examples"])
        return TokenizedCorpus(rows, offsets, ids, report)
    return None
