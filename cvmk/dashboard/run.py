"""A run as its events tell it: numbers, marks, the samples of the last validation, and how it is."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvmk.dashboard import charts
from cvmk.dashboard.follow import Follower
from cvmk.dashboard.numbers import Segments, Table, Window, extent, window
from cvmk.telemetry.schema import KINDS, Average, EarlyStop, End, Event, Interruption, Note, Record, Resumed, Rollback, Scored, Start, Unknown

MARKS = 400
"""Marks of a kind that are kept; older ones are counted."""
SAMPLES = 20
_SAMPLE_CHARACTERS = 2000
_TEXT_CHARACTERS = 500
_MARKED = (Start, Rollback, EarlyStop, Interruption, Note, End)


class Mark(NamedTuple):
    """Something that happened at a place of the run."""

    kind: str
    step: float
    time: float
    segment: int
    text: str
    is_trouble: bool


class Run:
    """What the log in `folder` says so far. `advance` is called by one thread; what is asked is answered in any."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.revision = 0
        self.progress = 0.0
        self._follower = Follower(folder)
        self._lock = threading.Lock()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.tables: dict[str, Table] = {kind: Table(fields) for kind, fields in charts.FIELDS.items()} | {"validation": Table()}
        self._marks: dict[str, deque[Mark]] = {}
        self._marked: Counter[str] = Counter()
        self._segments: list[tuple[float, float]] = [(0.0, 0.0)]  # the offset of its times, the iteration it went on from
        self._step = self._time = 0.0
        self._is_dated = False  # whether an event told its time
        self._facts: dict[str, Any] = {}
        self._latest: dict[str, float] = {}
        self._state = "waiting"
        self._samples: dict[str, Any] | None = None
        self._best: dict[str, Any] | None = None
        self._unknown: Counter[str] = Counter()
        self._lines = 0
        self._broken: list[int] = []
        self._broken_in_all = 0
        self._trouble = ""

    # -- reading ------------------------------------------------------------------------------------------------------------------------------
    def advance(self) -> bool:
        """Read the next piece of the log. False where there is nothing new."""
        try:
            piece = self._follower.read()
            trouble = ""
        except OSError as error:
            piece, trouble = None, f"the log cannot be read ({error.strerror or error})"
        with self._lock:
            changed = trouble != self._trouble
            self._trouble = trouble
            if piece is not None and piece.anew:
                self._begin_anew()
                changed = True
            for line in piece.lines if piece else ():
                self._line(line)
                changed = True
            progress = self._follower.progress()
            changed |= progress != self.progress
            self.progress = progress
            self.revision += changed
        return changed

    def close(self) -> None:
        self._follower.close()

    def _line(self, line: bytes) -> None:
        self._lines += 1
        if not line.strip():
            return
        try:
            values = json.loads(line)
            kind = values["event"]
            version = values.get("version", 1)
            if kind in charts.FIELDS and type(version) is int and version <= KINDS[kind].VERSION:
                self._numbers(kind, values)  # most of a log: no object is made of it
            else:
                self._event(Record.from_json(values))
        except Unknown as unknown:
            self._unknown[f"{unknown.kind[:40]!r} of version {str(unknown.version)[:10]}"] += 1
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._broken_in_all += 1
            if len(self._broken) < 3:
                self._broken.append(self._lines)

    def _numbers(self, kind: str, values: Mapping[str, Any]) -> None:
        time, step = values.get("time"), values.get("step")
        self._at(float(time) if isinstance(time, (int, float)) else math.nan, float(step) if isinstance(step, (int, float)) else None)
        found = charts.numbers(kind, values)
        self.tables[kind].add(self._step, self._time, len(self._segments) - 1, found)
        self._latest.update(found)
        self._state = "running"

    def _event(self, record: Record) -> None:
        event = record.event
        if isinstance(event, Start):
            self._starts(record.time if math.isfinite(record.time) else self._time, event)
        step = getattr(event, "step", None)
        self._at(record.time, None if step is None or isinstance(event, Resumed) else float(step))
        if isinstance(event, Scored):
            self._validated(event)
        self._state = {Interruption: "interrupted", EarlyStop: "stopped early", End: "finished"}.get(type(event), self._state)
        if (mark := self._mark(event)) is not None:
            self._marks.setdefault(mark.kind, deque(maxlen=MARKS)).append(mark)
            self._marked[mark.kind] += 1
        if isinstance(event, Rollback) and not event.final:
            self._segments.append((self._segments[-1][0], float(event.to)))
            self._step = float(event.to)

    def _starts(self, time: float, event: Start) -> None:
        """A stretch of training begins: the time since the last one does not count."""
        offset = self._segments[-1][0]
        if not self._is_dated:
            self._segments = [(0.0, float(event.step))]
        else:
            self._segments.append((offset + max(0.0, time - self._time), float(event.step)))
        self._step = float(event.step)
        self._state = "running"
        self._facts = {"title": event.title, "parameters": event.parameters, "iterations": event.iterations, "device": event.device}

    def _at(self, time: float, step: float | None) -> None:
        if math.isfinite(time):
            if not self._is_dated:
                self._segments = [(time, begin) for _, begin in self._segments]
                self._is_dated = True
            self._time = time
        if step is not None and math.isfinite(step):
            if step < self._step:  # it went back without saying so
                self._segments.append((self._segments[-1][0], step - 1))
            self._step = step

    def _validated(self, event: Scored) -> None:
        if not isinstance(event, Average):
            self.tables["validation"].add(self._step, self._time, len(self._segments) - 1, charts.scores(event))
        if not isinstance(event, Average) and getattr(event, "best", False):
            self._best = {"metric": charts.METRICS.get(event.metric, event.metric), "value": event.value if math.isfinite(event.value) else None, "step": event.step}
        if event.samples:
            shown = [{name: str(text)[:_SAMPLE_CHARACTERS] for name, text in sample.items()} for sample in event.samples[:SAMPLES]]
            self._samples = {"step": event.step, "samples": shown}

    def _mark(self, event: Event) -> Mark | None:
        if not isinstance(event, _MARKED) or (isinstance(event, Start) and not event.step):
            return None
        text = "finished" if isinstance(event, End) else f"resumed at iteration {event.step}" if isinstance(event, Start) else event.text() or ""
        return Mark(event.KIND, self._step, self._time, len(self._segments) - 1, text[:_TEXT_CHARACTERS], isinstance(event, (Rollback, EarlyStop)))

    # -- answers ------------------------------------------------------------------------------------------------------------------------------
    def summary(self) -> dict[str, Any]:
        """What the legend says of it, as JSON values."""
        with self._lock:
            ends = {axis: self._extent(axis) for axis in ("step", "time")}
            return {
                "name": self.name,
                "folder": str(self.folder),
                "state": self._state,
                "progress": round(self.progress, 3),
                "time": self._time if self._is_dated else None,
                "step": self._step,
                "extent": ends,
                "last": {name: value for name, value in self._latest.items() if math.isfinite(value)},
                "best": self._best,
                "problems": list(self._problems()),
                **self._facts,
            }

    def view(self, axis: str, low: float | None, high: float | None, points: int) -> tuple[dict[str, Window], list[dict[str, Any]]]:
        """Every kind's numbers in a window of an axis ("step", "time"), and the marks in it."""
        with self._lock:
            segments = self._as_arrays()
            shown = {kind: window(table, axis, segments, low, high, points) for kind, table in self.tables.items()}
            marks = [
                {"kind": mark.kind, "x": x, "step": mark.step, "time": mark.time, "text": mark.text, "trouble": mark.is_trouble}
                for mark in sorted((mark for kept in self._marks.values() for mark in kept), key=lambda mark: mark.time)
                for x in (mark.step if axis == "step" else mark.time - self._segments[mark.segment][0],)
                if (low is None or x >= low) and (high is None or x <= high)
            ]
            return shown, marks

    def samples(self) -> dict[str, Any] | None:
        return self._samples

    def _as_arrays(self) -> Segments:
        offsets, begins = np.array(self._segments).T
        later = np.minimum.accumulate(np.append(begins[1:], np.inf)[::-1])[::-1]
        return Segments(offsets, later)

    def _extent(self, axis: str) -> list[float] | None:
        found = [ends for table in self.tables.values() if (ends := extent(table, axis, self._as_arrays())) is not None]
        return [min(low for low, _ in found), max(high for _, high in found)] if found else None

    def _problems(self) -> Iterator[str]:
        if self._trouble:
            yield self._trouble
        for what, count in list(self._unknown.items())[:5]:
            yield f"{count} events {what} are passed over, this cvmk does not know them"
        if self._broken_in_all:
            lines = ", ".join(map(str, self._broken)) + (", …" if self._broken_in_all > len(self._broken) else "")
            yield f"{self._broken_in_all} lines of the log are broken and left out (line {lines})"
