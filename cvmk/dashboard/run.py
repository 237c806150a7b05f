"""A run as its events tell it: numbers, marks, the samples of the last validation, and how it is."""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvmk.dashboard.charts import ANOMALIES, ITERATION, METRICS, Chart, chart
from cvmk.dashboard.numbers import Segments, Table, Window, extent, window
from cvmk.errors import DataError
from cvmk.telemetry import EventReader, Record
from cvmk.telemetry.curves import points
from cvmk.telemetry.events import EVENTS
from cvmk.telemetry.schema import (
    Anomaly,
    Average,
    EarlyStop,
    End,
    Epoch,
    Event,
    Interruption,
    Iterations,
    QuantizationEnded,
    Rollback,
    SearchEnded,
    SearchStarted,
    Serving,
    ServingEnded,
    ServingStarted,
    Start,
    Step,
    TrialEnded,
    Validation,
)

MARKS = 400
"""Marks of a kind that are kept; older ones are counted."""
SAMPLES = 20
PIECE = 1 << 20
"""Bytes of a log that are read at a time."""
PROBLEMS = 6
"""Sentences on what cannot be read that are told of a run."""
_SAMPLE_CHARACTERS = 2000
_TEXT_CHARACTERS = 500
_STATES: dict[type[Event], str] = {
    Interruption: "interrupted", EarlyStop: "stopped early", End: "finished", SearchEnded: "finished", QuantizationEnded: "finished", ServingEnded: "finished",
}  # fmt: skip
_RUNNING = (Iterations, Step, SearchStarted, ServingStarted, Serving)
_LATEST, _FURTHEST = 1e12, 1 << 50
_MOST_CHARTS = 100
_MOST_NAMES = 1000


class Mark(NamedTuple):
    """Something that happened at a place of the run."""

    kind: str
    step: float
    time: float
    segment: int
    text: str
    is_trouble: bool
    chart: str | None = None
    """The name of the chart that it belongs to; None for all."""
    value: float | None = None


class Run:
    """What the log in `folder` says so far. `advance` is called by one thread; what is asked is answered in any."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.is_nested = False
        """Whether it is in the folder of another run, as a teacher is."""
        self.progress = 0.0
        self._lock = threading.Lock()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._reader = EventReader(self.folder / EVENTS)
        self.charts: dict[str, Chart] = {}
        self._places: dict[str, tuple[str, float]] = {}
        self.tables: dict[str, Table] = {}
        self._marks: dict[str, deque[Mark]] = {}
        self._segments: list[tuple[float, float]] = [(0.0, 0.0)]  # the offset of its times, the iteration it went on from
        self._step = self._trained = self._time = 0.0
        self._periods = 0  # of a service, which has no iterations
        self._is_dated = False  # whether an event told its time
        self._facts: dict[str, Any] = {}
        self._latest: dict[str, float] = {}
        self._state = "waiting"
        self._samples: dict[str, Any] | None = None
        self._best: dict[str, Any] | None = None
        self._metric = ""  # of a search
        self._unread = 0
        self._problems: list[str] = []

    # -- reading ------------------------------------------------------------------------------------------------------------------------------
    def advance(self) -> bool:
        """Read the next piece of the log. False where there is nothing new."""
        trouble, records, progress = "", [], 1.0
        try:
            records = self._reader.read(PIECE)
            progress = self._reader.progress
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # it is waited for
                trouble = str(error)
        with self._lock:
            before = (self._problems, self.progress)
            if self._reader.anew:  # what was read is no longer what is there
                self._begin_anew()
                return True
            for record in records:
                try:
                    self._event(record)
                except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError):  # lists and objects may hold anything
                    self._unread += 1
            self.progress = progress
            if trouble or not records:  # a line that is not whole may be one that is being written
                self._problems = self._found(trouble)
            return bool(records) or before != (self._problems, self.progress)

    def _found(self, trouble: str) -> list[str]:
        """What cannot be read, a sentence each."""
        found = [trouble] if trouble else []
        found += [problem.removeprefix(f"{self.folder}/") for problem in self._reader.problems()]
        if self._unread:
            found.append(f"{self._unread} events hold what makes no sense there, and are left out")
        return found if len(found) <= PROBLEMS else [*found[:PROBLEMS], f"and {len(found) - PROBLEMS} more"]

    def _event(self, record: Record) -> None:
        event = record.event
        time = record.time if abs(record.time) < _LATEST else self._time
        if abs(getattr(event, "step", None) or 0) > _FURTHEST:
            raise ValueError("no run is that long")
        if isinstance(event, Start):
            self._starts(time, event.step)
            self._state = "running"
            self._facts = {"title": event.title, "parameters": event.parameters, "iterations": event.iterations, "device": event.device}
        elif isinstance(event, ServingStarted):
            self._starts(time, self._periods)
        self._at(time, event)
        self._numbers(event)
        if isinstance(event, (Validation, Average)):
            self._validated(event)
        elif isinstance(event, SearchStarted):
            self._metric = METRICS.get(event.metric, event.metric)
        elif isinstance(event, TrialEnded) and event.best and event.value is not None and math.isfinite(event.value):
            self._best = {"metric": self._metric, "value": event.value, "step": event.step or 0}
        self._state = _STATES.get(type(event), "running" if isinstance(event, _RUNNING) or self._state == "waiting" else self._state)
        if (mark := self._mark(event)) is not None:
            self._marks.setdefault(mark.kind, deque(maxlen=MARKS)).append(mark)
        if isinstance(event, Rollback) and not event.final:
            self._goes_on(self._segments[-1][0], event.to)

    def _starts(self, time: float, step: int) -> None:
        """A stretch of training begins, or of service: the time since the last one does not count."""
        if self._is_dated:
            self._goes_on(self._segments[-1][0] + max(0.0, time - self._time), step)
        else:
            self._segments.clear()
            self._goes_on(time, step)

    def _goes_on(self, offset: float, step: int) -> None:
        self._segments.append((offset, float(step)))
        self._step = self._trained = float(step)

    def _at(self, time: float, event: Event) -> None:
        if not self._is_dated:
            self._segments = [(time, begin) for _, begin in self._segments]
            self._is_dated = True
        self._time = time
        if isinstance(event, (Step, Validation, Anomaly, Rollback, EarlyStop, Interruption, Epoch)):
            self._step = float(event.step)
        elif isinstance(event, Iterations):
            self._step = float(event.step + max(0, len(event.loss) - 1))

    def _numbers(self, event: Event) -> None:
        """Its points, those of an iteration together. `Step` says again what `Iterations` said."""
        seconds = event.seconds if isinstance(event, Iterations) else []
        left = math.fsum(one for one in seconds if math.isfinite(one))
        self._periods += isinstance(event, Serving)
        for place, (step, found) in enumerate(itertools.groupby(points(event, self._periods), lambda point: point.step)):
            left -= seconds[place] if seconds and math.isfinite(seconds[place]) else 0.0
            rows: dict[str, dict[str, float]] = {}
            for name, _, value in found:
                table, factor = self._places.get(name) or self._place(name)
                if table and (table != ITERATION or step > self._trained):
                    rows.setdefault(table, {})[name] = value * factor
            for table, row in rows.items():
                if table not in self.tables:
                    self.tables[table] = Table()
                self.tables[table].add(step, self._time - max(0.0, left), len(self._segments) - 1, row)
            if ITERATION in rows:
                self._trained = step
                self._latest.update(rows[ITERATION])

    def _place(self, name: str) -> tuple[str, float]:
        """The table of a point's name, "" for none, and the factor of its chart."""
        one = chart(name) if len(self.charts) < _MOST_CHARTS else None
        if one is not None:
            self.charts[name] = one
        if len(self._places) < _MOST_NAMES:
            self._places[name] = ("", 1.0) if one is None else (one.table, one.factor)
        return ("", 1.0) if one is None else (one.table, one.factor)

    def _validated(self, event: Validation | Average) -> None:
        if isinstance(event, Validation) and event.best:
            value = event.value if math.isfinite(event.value) else None
            self._best = {"metric": METRICS.get(event.metric, event.metric), "value": value, "step": event.step}
        if event.samples:
            shown = [
                {name: str(sample.get(name, ""))[:_SAMPLE_CHARACTERS] for name in ("source", "reference", "hypothesis")}
                for sample in event.samples[:SAMPLES]
                if isinstance(sample, dict)
            ]
            self._samples = {"step": event.step, "samples": shown}

    def _mark(self, event: Event) -> Mark | None:
        if isinstance(event, (Step, Validation)) or (isinstance(event, Start) and not event.step):
            return None
        text = "finished" if isinstance(event, End) else f"resumed at iteration {event.step}" if isinstance(event, Start) else event.text()
        if text is None:
            return None
        one, value = None, None
        if isinstance(event, Anomaly):
            one = ANOMALIES.get(event.quantity)
            value = event.value if math.isfinite(event.value) else None
        trouble = isinstance(event, (Anomaly, Rollback, EarlyStop))
        return Mark(event.KIND, self._step, self._time, len(self._segments) - 1, text[:_TEXT_CHARACTERS], trouble, one, value)

    # -- answers ------------------------------------------------------------------------------------------------------------------------------
    def summary(self) -> dict[str, Any]:
        """What the legend says of it, as JSON values."""
        with self._lock:
            ends = {axis: self._extent(axis) for axis in ("step", "time")}
            return {
                "name": self.name,
                "nested": self.is_nested,
                "folder": str(self.folder),
                "state": self._state,
                "progress": round(self.progress, 3),
                "time": self._time if self._is_dated else None,
                "step": self._step,
                "extent": ends,
                "last": {name: value for name, value in self._latest.items() if math.isfinite(value)},
                "best": self._best,
                "problems": self._problems,
                **self._facts,
            }

    def view(self, axis: str, low: float | None, high: float | None, width: int) -> tuple[dict[str, Window], list[dict[str, Any]]]:
        """Every table's numbers in a window of an axis ("step", "time"), about `width` rows of each at most, and the marks in it."""
        with self._lock:
            segments = self._as_arrays()
            shown = {name: window(table, axis, segments, low, high, width) for name, table in self._tables(axis).items()}
            marks = [
                {"kind": mark.kind, "x": x, "step": mark.step, "time": mark.time, "text": mark.text, "trouble": mark.is_trouble}
                | ({"chart": mark.chart, "value": mark.value} if mark.chart else {})
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

    def _tables(self, axis: str) -> dict[str, Table]:
        """What stands on an axis: nothing of a service does on that of the iterations."""
        return {} if axis == "step" and self._periods else self.tables

    def _extent(self, axis: str) -> list[float] | None:
        found = [ends for table in self._tables(axis).values() if (ends := extent(table, axis, self._as_arrays())) is not None]
        return [min(low for low, _ in found), max(high for _, high in found)] if found else None
