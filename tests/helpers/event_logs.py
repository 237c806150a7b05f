"""Logs of runs that were never trained: `write(folder, steps(3), validation(20, 31.0))`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cvmk.telemetry.schema import Event, Record, Start, Step, Validation

EPOCH = 1_700_000_000.0


def start(step: int = 0, iterations: int = 1000) -> Start:
    return Start("student", 1_000_000, 100, step, iterations, "cpu")


def steps(numbers: Iterable[int], loss: float | None = None) -> Iterator[Step]:
    """Logged iterations; the loss is 100 / step unless given."""
    for number in numbers:
        yield Step(number, 1e-3, 0.5, 9000.0, 100 / number if loss is None else loss, 50 / number)


def validation(step: int, bleu: float, **fields: Any) -> Validation:
    scores = [{"metric": "bleu", "value": bleu}, {"metric": "chrf", "value": bleu + 20}]
    return Validation(step, "bleu", bleu, bleu - 1, bleu + 1, 0.95, scores, [], 10, 1.0, 100, **fields)


def lines(*events: Event, begin: float = EPOCH) -> bytes:
    """A second apart, from `begin` on."""
    return b"".join(json.dumps(Record(begin + place, event).to_json()).encode() + b"\n" for place, event in enumerate(events))


def write(folder: Path, *events: Event, begin: float = EPOCH) -> Path:
    """Append events to the log of a run; gives its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "events.jsonl", "ab") as file:
        file.write(lines(*events, begin=begin))
    return folder
