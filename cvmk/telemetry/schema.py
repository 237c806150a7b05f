"""What a run says of itself: every kind of event is a class with a version, and one JSON object on a line of `events.jsonl`.

    {"time": seconds since the epoch, "event": KIND, "version": VERSION, ...the fields}

A field that is added with a default leaves the version as it is: older readers pass it over. A field that is removed, or means
something else, raises it. Lines of before there were versions are of version 1. Numbers that are not finite are null in the file, and NaN where
the field is a number or a list of numbers that is read back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from cvmk.telemetry.event import Event
from cvmk.telemetry.quantization_events import QuantizationEnded, QuantizationStarted, QuantizationTrial, Recovering
from cvmk.telemetry.search_events import SearchEnded, SearchStarted, TrialEnded, TrialScored, TrialStarted, TrialTick
from cvmk.telemetry.serving_events import Serving, ServingEnded, ServingStarted
from cvmk.telemetry.training_events import (
    Anomaly,
    Average,
    EarlyStop,
    End,
    Epoch,
    Evaluation,
    Interruption,
    Iterations,
    Note,
    Notice,
    Profiled,
    Resources,
    Resumed,
    Rollback,
    Scored,
    Start,
    Step,
    Taught,
    Tick,
    Validation,
)

__all__ = [
    "Anomaly", "Average", "EVENTS", "EarlyStop", "End", "Epoch", "Evaluation", "Event", "Interruption", "Iterations", "KINDS", "Note", "Notice",
    "Profiled", "QuantizationEnded", "QuantizationStarted", "QuantizationTrial", "Record", "Recovering", "Resources", "Resumed", "Rollback", "Scored",
    "SearchEnded", "SearchStarted", "Serving", "ServingEnded", "ServingStarted", "Start", "Step", "Taught", "Tick", "TrialEnded", "TrialScored",
    "TrialStarted", "TrialTick", "Unknown", "Validation",
]  # fmt: skip

EVENTS: tuple[type[Event], ...] = (
    Start, Resumed, Taught, Step, Iterations, Epoch, Anomaly, Resources, Validation, Average, Rollback, EarlyStop, Interruption, Note, Profiled, End,
    Evaluation,
    SearchStarted, TrialStarted, TrialScored, TrialEnded, SearchEnded,
    QuantizationStarted, Recovering, QuantizationTrial, QuantizationEnded,
    ServingStarted, Serving, ServingEnded,
)  # fmt: skip
"""Every kind that is written to a file."""

KINDS = {event.KIND: event for event in EVENTS}


class Record(NamedTuple):
    """An event and when it happened, in seconds since the epoch."""

    time: float
    event: Event

    def to_json(self) -> dict[str, Any]:
        return {"time": self.time, "event": self.event.KIND, "version": self.event.VERSION, **_finite(self.event.values())}

    @classmethod
    def from_json(cls, line: Any) -> Record:
        """Raises Unknown for an event that this cvmk does not know, ValueError for one that is broken."""
        if not isinstance(line, Mapping) or not isinstance(line.get("event"), str):
            raise ValueError("it is no event")
        kind, version = line["event"], line.get("version", 1)
        known = KINDS.get(kind)
        if known is None or not isinstance(version, int) or version > known.VERSION:
            raise Unknown(kind, version)
        return cls(float(line.get("time", math.nan)), known.of(line))

    @classmethod
    def now(cls, event: Event) -> Record:
        return cls(round(time.time(), 3), event)


class Unknown(Exception):
    """An event of a kind or a version that this cvmk does not know."""

    def __init__(self, kind: str, version: Any) -> None:
        super().__init__(f"event {kind!r}, version {version}")
        self.kind, self.version = kind, version


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
