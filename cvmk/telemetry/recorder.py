"""From single iterations to events: columns of many, anomalies, and a sum by epoch."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import NamedTuple

from cvmk.telemetry.anomalies import AnomalyWatch
from cvmk.telemetry.schema import Epoch, Iterations
from cvmk.telemetry.stream import EventStream

_SECONDS = 1.0
"""After so long at most what was recorded is written, for those who look on."""
_ROWS = 200
ANOMALIES = 100
"""Of each epoch and quantity that are written; the others are counted."""
_DIGITS = 6


class Iteration(NamedTuple):
    """What an iteration was; the fields are those of `Iterations`. `epoch` counts from 0; `begins` and `ends` say that it is the first or last one of it."""

    step: int
    epoch: int
    begins: bool
    ends: bool
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    data_wait: float


class Recorder:
    """Takes every iteration of a training, and emits `Iterations`, `Anomaly` and `Epoch`.

    iterations   whether every iteration is written down.
    watch        what finds the anomalies; None: nobody does.
    """

    def __init__(self, events: EventStream, *, iterations: bool = True, watch: AnomalyWatch | None = None) -> None:
        self._events, self._iterations, self._watch = events, iterations, watch
        self._rows: list[Iteration] = []
        self._epoch: _Tally | None = None
        self._written = time.monotonic()
        self.step = 0
        """The last iteration."""

    def iteration(self, row: Iteration) -> None:
        """An iteration was done. Raises DataError where a log cannot be written."""
        self.step = row.step
        if self._epoch is None or self._epoch.epoch != row.epoch or row.begins:
            self._end_epoch(whole=False)
            self._epoch = _Tally(row.epoch, row.begins)
        self._epoch.add(row)
        if self._watch is not None:
            for anomaly in self._watch.look(row.step, row.loss, row.gradient_norm, row.tokens, row.seconds, row.data_wait):
                self._epoch.anomalies[anomaly.quantity] += 1
                if self._epoch.anomalies[anomaly.quantity] <= ANOMALIES:
                    self._events.emit(anomaly)
        if self._iterations:
            self._rows.append(row)
            if len(self._rows) >= _ROWS or time.monotonic() - self._written >= _SECONDS:
                self.flush()
        if row.ends:
            self._end_epoch(whole=True)

    def flush(self) -> None:
        """Write down what was recorded so far."""
        rows, self._rows = self._rows, []
        self._written = time.monotonic()
        if rows:
            self._events.emit(
                Iterations(
                    rows[0].step,
                    [_short(row.loss) for row in rows],
                    [_short(row.learning_rate) for row in rows],
                    [_short(row.gradient_norm) for row in rows],
                    [row.tokens for row in rows],
                    [_short(row.seconds) for row in rows],
                    [_short(row.data_wait) for row in rows],
                )
            )

    def finish(self) -> None:
        """No iteration follows, or none that continues from the last one: training ends, or goes back."""
        self._end_epoch(whole=False)
        self.flush()
        if self._watch is not None:
            self._watch.reset()

    def _end_epoch(self, *, whole: bool) -> None:
        tally, self._epoch = self._epoch, None
        if tally is not None:
            self.flush()
            self._events.emit(tally.event(whole))


class _Tally:
    """An epoch so far."""

    def __init__(self, epoch: int, from_beginning: bool) -> None:
        self.epoch, self._from_beginning = epoch, from_beginning
        self.anomalies: Counter[str] = Counter()
        self._step = self._count = self._tokens = 0
        self._seconds = self._data_wait = self._loss = 0.0

    def add(self, row: Iteration) -> None:
        self._step, self._count, self._tokens = row.step, self._count + 1, self._tokens + row.tokens
        self._seconds += row.seconds
        self._data_wait += row.data_wait
        self._loss += row.loss

    def event(self, whole: bool) -> Epoch:
        loss, seconds, wait = self._loss / self._count, round(self._seconds, 3), round(self._data_wait, 3)
        return Epoch(self.epoch + 1, self._step, self._count, self._tokens, seconds, wait, loss, dict(self.anomalies), whole and self._from_beginning)


def _short(value: float) -> float:
    """As many digits as anybody looks at."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else value
