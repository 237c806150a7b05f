"""What the events of a run say, taken in as they are read: however many there are, some hundred points a curve are kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Self

from cvmk.telemetry import schema
from cvmk.telemetry.curves import points
from cvmk.telemetry.recorder import ANOMALIES
from cvmk.telemetry.schema import Record

BINS = 200
"""A curve keeps this many bins at least, twice as many at most."""
NOTES = 20


@dataclass(slots=True)
class Bin:
    """Values of neighbouring iterations: their mean, and from where to where they go (of a score: its confidence interval)."""

    first: int
    last: int
    mean: float
    low: float
    high: float
    count: int = 1
    pass_: int = 0
    """Of which pass over these iterations it is: a rollback begins another one."""

    def add(self, step: int, mean: float, low: float, high: float, count: int = 1) -> None:
        self.last = step
        self.count += count
        self.mean += (mean - self.mean) * count / self.count
        if low < self.low:
            self.low = low
        if high > self.high:
            self.high = high


class BoundedCurve:
    """Values by iteration, in the order in which they came. Neighbours share a bin when there are too many; what is no number is counted."""

    def __init__(self) -> None:
        self.bins: list[Bin] = []
        self.not_finite = 0
        self._size = 1

    def add(self, step: int, value: float, low: float = math.nan, high: float = math.nan, pass_: int = 0) -> bool:
        """Whether it was taken: what an iteration has said already is not."""
        last = self.bins[-1] if self.bins else None
        if last is not None and last.pass_ == pass_ and step <= last.last:
            return False
        if not math.isfinite(value):
            self.not_finite += 1
            return False
        low = low if math.isfinite(low) else value
        high = high if math.isfinite(high) else value
        if last is not None and last.count < self._size and last.pass_ == pass_:
            last.add(step, value, low, high)
            return True
        self.bins.append(Bin(step, step, value, low, high, pass_=pass_))
        if len(self.bins) > 2 * BINS:
            self._halve()
        return True

    def cut(self, step: int) -> None:
        """Forget what came after `step`: the run goes on from it, and comes by again."""
        while self.bins and self.bins[-1].first > step:
            self.bins.pop()

    def last_pass(self) -> list[Bin]:
        """Without what rollbacks undid, as far as it was done again."""
        return [one for one in self.bins if one.pass_ == self.bins[-1].pass_]

    def _halve(self) -> None:
        self._size *= 2
        if len({one.pass_ for one in self.bins}) > BINS // 2:
            for one in self.bins:
                one.pass_ = self.bins[-1].pass_
        joined: list[Bin] = []
        for _, group in groupby(self.bins, lambda one: one.pass_):
            for index, one in enumerate(group):
                if index % 2 and joined[-1].count + one.count <= self._size:
                    joined[-1].add(one.last, one.mean, one.low, one.high, one.count)
                else:
                    joined.append(one)
        self.bins = joined


@dataclass
class History:
    """What the events of one run say. `of` reads them once."""

    curves: dict[str, BoundedCurve] = field(default_factory=dict)
    """By the names of `cvmk.telemetry.curves.points`; the bins of "validation/" and the deciding metric hold its confidence interval."""
    parameters: int | None = None
    step: int = 0
    """The last iteration that the events tell of."""
    first_time: float | None = None
    """Seconds since the epoch."""
    last_time: float | None = None
    counts: Counter[str] = field(default_factory=Counter)
    """Events by kind."""
    last_validation: schema.Validation | None = None
    best_validation: schema.Validation | None = None
    rollbacks: list[schema.Rollback] = field(default_factory=list)
    """The first of them."""
    early_stop: str | None = None
    ended: bool = False
    notes: list[str] = field(default_factory=list)
    iterations: int = 0
    """Whose loss is known."""
    logged: int = 0
    """Iterations after the warm-up whose gradient norm is known, and how many of them were clipped."""
    clipped: int = 0
    seconds: float = 0.0
    """Of iterations, and how long of that they waited for their batches."""
    data_wait: float = 0.0
    anomalies: Counter[str] = field(default_factory=Counter)
    """By quantity."""

    @classmethod
    def of(cls, records: Iterable[Record], warmup: int = 0, clip_norm: float = 0.0) -> Self:
        """Clipping is counted after `warmup` iterations, of gradients beyond `clip_norm` (0: none is clipped)."""
        self = cls()
        for record in records:
            self._take(record)
            self._draw(record.event, warmup, clip_norm)
        return self

    def curve(self, name: str) -> BoundedCurve:
        """An empty one where the events say nothing of it."""
        return self.curves.get(name) or BoundedCurve()

    def _take(self, record: Record) -> None:
        event = record.event
        self.counts[event.KIND] += 1
        if math.isfinite(record.time):
            self.first_time = record.time if self.first_time is None else self.first_time
            self.last_time = record.time
        if isinstance(event, (schema.Start, schema.Resumed)):
            self._begin(event)
        elif isinstance(event, schema.Validation):
            self.last_validation = event
            if event.best or self.best_validation is None:
                self.best_validation = event
        elif isinstance(event, schema.Iterations):
            self.seconds += sum(value for value in event.seconds if math.isfinite(value))
            self.data_wait += sum(value for value in event.data_wait if math.isfinite(value))
        elif isinstance(event, schema.Anomaly):
            self.anomalies[event.quantity] += 1
        elif isinstance(event, schema.Epoch):
            self._epoch(event)
        elif isinstance(event, schema.Rollback) and len(self.rollbacks) < NOTES:
            self.rollbacks.append(event)
        elif isinstance(event, schema.EarlyStop):
            self.early_stop = event.reason or "it stopped early"
        elif isinstance(event, schema.End):
            self.ended = True
        elif isinstance(event, schema.Note) and len(self.notes) < NOTES and event.message not in self.notes:
            self.notes.append(event.message)

    def _begin(self, event: schema.Start | schema.Resumed) -> None:
        """Iterations after the checkpoint that the run goes on from are done again."""
        for curve in self.curves.values():
            curve.cut(event.step)
        self.early_stop, self.ended = None, False
        if isinstance(event, schema.Start):
            self.parameters = event.parameters

    def _epoch(self, event: schema.Epoch) -> None:
        """An epoch counts all of its anomalies, of which only the first are events."""
        for quantity, count in event.anomalies.items():
            if isinstance(count, int):
                self.anomalies[quantity] += max(0, count - ANOMALIES)

    def _draw(self, event: schema.Event, warmup: int, clip_norm: float) -> None:
        passes = self.counts["rollback"]
        for name, step, value in points(event):
            curve = self.curves.get(name)
            if curve is None:
                curve = self.curves[name] = BoundedCurve()
            if isinstance(event, schema.Validation) and name == f"validation/{event.metric}":
                curve.add(step, value, event.low, event.high, passes)
                self.step = max(self.step, step)
            elif curve.add(step, value, pass_=passes):
                if name == "loss":
                    self.iterations += 1
                    self.step = max(self.step, step)
                elif name == "gradient_norm" and step > warmup:
                    self.logged += 1
                    self.clipped += 0 < clip_norm < value

