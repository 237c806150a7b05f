"""What the final weights of a run were scored on, sentence by sentence, so that runs can be compared when all else is gone.

`evaluations/validation.jsonl` and `evaluations/test.jsonl` in the run's folder: a line of facts, then a line a sentence. A file is written whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvmk.errors import DataError
from cvmk.files import read_bytes, write_bytes

VERSION = 1
MOST = 10_000
"""Sentences that are kept of a set, the first ones: some 5 MB."""
SETS = ("validation", "test")


@dataclass(frozen=True)
class Evaluation:
    """Sentences of a set, their references, and what the model (and its teacher) made of them: lists of one length."""

    sources: tuple[str, ...]
    references: tuple[str, ...]
    hypotheses: tuple[str, ...]
    teacher: tuple[str, ...] | None
    """The teacher's translations; None without a teacher, or where they are not known."""
    sentences: int
    """How many the set has; more than are here where it is long."""

    def same_set(self, other: Evaluation) -> bool:
        """Whether both were scored on the same sentences against the same references."""
        return (self.sources, self.references, self.sentences) == (other.sources, other.references, other.sentences)


def write_evaluation(
    path: str | os.PathLike[str], sources: Sequence[str], references: Sequence[str], hypotheses: Sequence[str], teacher: Sequence[str] | None = None
) -> None:
    """Keep the first `MOST` sentences. Raises DataError where the file cannot be written."""
    lines: list[dict[str, Any]] = [{"version": VERSION, "sentences": len(sources), "kept": min(len(sources), MOST)}]
    for index in range(lines[0]["kept"]):
        line = {"source": sources[index], "reference": references[index], "hypothesis": hypotheses[index]}
        lines.append(line if teacher is None else line | {"teacher": teacher[index]})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # a surrogate becomes JSON's own escape


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Raises DataError for a file that is missing, cut, or of a newer version."""
    path = Path(path)
    data = read_bytes(path)
    try:
        facts, *rows = [json.loads(line) for line in data.split(b"\n")[:-1]]
        version, sentences, kept = (int(facts[name]) for name in ("version", "sentences", "kept"))
        if version > VERSION:
            raise DataError(f"{path} is of version {version}, and this cvmk reads up to {VERSION}: use a newer cvmk")
        columns = [tuple(_text(row[name]) for row in rows) for name in ("source", "reference", "hypothesis")]
        taught = bool(rows) and all("teacher" in row for row in rows)
        teacher = tuple(_text(row["teacher"]) for row in rows) if taught else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is corrupt ({type(error).__name__}: {error}): without it this run cannot be compared sentence by sentence") from error
    if len(rows) != kept or not rows:
        raise DataError(f"{path} is cut off: it has {len(rows)} of {kept} sentences")
    return Evaluation(columns[0], columns[1], columns[2], teacher, sentences)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
