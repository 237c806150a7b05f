"""Parallel text from files: two aligned files, TSV or JSONL, plain or compressed.

Lines are those of `cvmk.text.lines`. White space around a sentence (and with it \\r) and byte order marks are removed; nothing else
is changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cvmk.config.schema import CorpusConfig, DataConfig
from cvmk.deprecation import moved
from cvmk.errors import DataError
from cvmk.text.lines import text_lines, trimmed

__all__ = ["CorpusReport", "ParallelCorpus", "read_corpus"]

__getattr__ = moved(__name__, "cvmk.config.languages", "check_language")

EXAMPLES = 5
_CHUNK = 4096


@dataclass
class CorpusReport:
    """What was read and what was left out: line counts, problems by kind, and the first few of them."""

    read: int = 0
    kept: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        return self.read - self.kept

    def add(self, kind: str, where: str) -> None:
        """Count one skipped pair."""
        self.problems[kind] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {kind}")

    def describe(self, name: str) -> str:
        """One or two plain sentences for the log."""
        if not self.skipped:
            return f"{name}: {self.kept} pairs"
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.problems.items()))
        return f"{name}: {self.kept} of {self.read} pairs; {self.skipped} skipped ({kinds}), for example {'; '.join(self.examples)}"


@dataclass
class ParallelCorpus:
    """Aligned sentences. `lines[i]` is the 1-based line of pair i in `origin`, the file of the sources; `target_origin` is that of the targets."""

    sources: list[str]
    targets: list[str]
    name: str
    report: CorpusReport
    origin: str = ""
    lines: Sequence[int] = ()
    target_origin: str = ""

    def __len__(self) -> int:
        return len(self.sources)

    def where(self, index: int) -> str:
        """Where pair `index` comes from, as `file:line`."""
        line = self.lines[index] if len(self.lines) else index + 1
        return f"{self.origin or self.name}:{line}"

    @cached_property
    def fingerprints(self) -> tuple[str, str]:
        """Hexadecimal sha256 of the sources and of the targets, in their order; wherever they come from."""
        return _fingerprint(self.sources), _fingerprint(self.targets)


def _fingerprint(sentences: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{len(sentences)}\n".encode())
    for start in range(0, len(sentences), _CHUNK):  # sentences hold no line break, so joining is unambiguous
        digest.update(("\n".join(sentences[start : start + _CHUNK]) + "\n").encode(errors="surrogatepass"))
    return digest.hexdigest()


class _BadLine(Exception):
    """`kind` of problem, at `where` ("file:line")."""

    def __init__(self, kind: str, where: str) -> None:
        super().__init__(kind)
        self.kind = kind
        self.where = where


def read_corpus(corpus: CorpusConfig, data: DataConfig, name: str, training: bool) -> ParallelCorpus:
    """Read one corpus of the configuration; `name` is its key, such as "data.train".

    Bad lines are handled as data.on_bad_line says, in evaluation corpora too: a pair never vanishes without a count.
    Raises DataError for missing, empty, corrupt or misaligned files, for the first bad line (`error`), and where
    nothing is left (`skip`).
    """
    folder = Path(data.folder)
    if corpus.source and corpus.target:
        origin, other = folder / corpus.source, folder / corpus.target
        rows = _aligned_rows(origin, other)
    elif corpus.tsv:
        origin = other = folder / corpus.tsv
        rows = _tsv_rows(origin)
    else:
        assert corpus.jsonl
        origin = other = folder / corpus.jsonl
        rows = _jsonl_rows(origin, data.jsonl_source, data.jsonl_target)
    report = CorpusReport()
    result = ParallelCorpus([], [], name, report, os.fspath(origin), lines := [], os.fspath(other))
    for line, row in enumerate(rows, 1):
        report.read += 1
        if isinstance(row, _BadLine):
            if data.on_bad_line == "error":
                remedy = 'correct the line, or set data.on_bad_line = "skip" to leave such lines out' + ("" if training else " of the evaluation")
                raise DataError(f"{row.where}: {row.kind}; {remedy}") from row
            report.add(row.kind, row.where)
            continue
        result.sources.append(row[0])
        result.targets.append(row[1])
        lines.append(line)
    report.kept = len(result)
    if not result.sources:
        raise DataError(f"{name} has no usable pair left: {report.describe(os.fspath(origin))}; correct the file")
    return result


Row = tuple[str, str] | _BadLine


def _aligned_rows(source: Path, target: Path) -> Iterator[Row]:
    sources = text_lines(source)
    targets = text_lines(target)
    counts = [0, 0]
    for number, (left, right) in enumerate(_zip_longest(sources, targets), 1):
        counts[0] += left is not None
        counts[1] += right is not None
        if left is None or right is None:
            continue  # the loop goes on because the message gives the lengths of both files
        try:
            yield _text(left, source, number), _text(right, target, number)
        except _BadLine as bad:
            yield bad
    if counts[0] != counts[1]:
        raise DataError(f"{source} has {counts[0]} lines and {target} has {counts[1]}: aligned files need one line each for every pair")


def _zip_longest(left: Iterator[bytes], right: Iterator[bytes]) -> Iterator[tuple[bytes | None, bytes | None]]:
    while True:
        pair = next(left, None), next(right, None)
        if pair == (None, None):
            return
        yield pair


def _tsv_rows(path: Path) -> Iterator[Row]:
    for number, raw in enumerate(text_lines(path), 1):
        try:
            if not raw.strip():
                raise _BadLine("empty line", f"{path}:{number}")
            fields = raw.split(b"\t")
            if len(fields) != 2:
                raise _BadLine(f"{len(fields)} tab-separated field{'s' if len(fields) > 1 else ''} instead of 2", f"{path}:{number}")
            yield _text(fields[0], path, number), _text(fields[1], path, number)
        except _BadLine as bad:
            yield bad


def _jsonl_rows(path: Path, *keys: str) -> Iterator[Row]:
    for number, raw in enumerate(text_lines(path), 1):
        try:
            source, target = _json_fields(raw, keys, path, number)
            yield source, target
        except _BadLine as bad:
            yield bad


def _json_fields(raw: bytes, keys: Sequence[str], path: Path, number: int) -> list[str]:
    where = f"{path}:{number}"
    text = _text(raw, path, number)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadLine("not JSON", where) from error
    if not isinstance(record, dict):
        raise _BadLine("not a JSON object", where)
    values = []
    for key in keys:
        if key not in record:
            raise _BadLine(f'no key "{key}"', where)
        if not isinstance(record[key], str):
            raise _BadLine(f'the value of "{key}" is not a string', where)
        try:
            value = record[key].encode()  # JSON can spell a lone surrogate, UTF-8 cannot
        except UnicodeEncodeError as error:
            raise _BadLine("invalid Unicode (a lone surrogate)", where) from error
        values.append(_text(value, path, number))
        if "\n" in values[-1]:
            raise _BadLine("line break inside a sentence", where)
    return values


def _text(raw: bytes, path: Path, number: int) -> str:
    """A line's sentence. Raises _BadLine."""
    where = f"{path}:{number}"
    try:
        text = trimmed(raw.decode())
    except UnicodeDecodeError as error:
        raise _BadLine("invalid UTF-8", where) from error
    if not text:
        raise _BadLine("empty line", where)
    if "\0" in text:
        raise _BadLine("NUL character", where)
    return text
