"""Iterations that are not like those before them.

What is usual is told by quantiles of the last values, which a few extraordinary ones do not move (up to a quarter of them), so that what lasts becomes
the usual. A loss or a gradient norm falls as training goes on: it is compared with the median of the last 32 values, and its distance from that with such
distances of the last 256 iterations, by their interquartile range over 1.349, which is the standard deviation where they are normal.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator

from cvmk.telemetry.schema import Anomaly

NEAR, WINDOW = 32, 256
SETTLED = 32
"""Values that have to be there before one is judged."""
_NORMAL = 1.349
_LEAST = 1e-3
"""A standard deviation is this share of the median at least: numbers that are all but equal have no outliers."""
_SLOW = 0.5
_STALL = 0.5
_STALL_SECONDS = 0.01


class Window:
    """The last values, in order."""

    def __init__(self, size: int = WINDOW) -> None:
        self._size = size
        self._values: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, value: float) -> None:
        """Take a finite value in, and the oldest out where there are too many."""
        if len(self._values) == self._size:
            del self._sorted[bisect_left(self._sorted, self._values.popleft())]
        self._values.append(value)
        insort(self._sorted, value)

    @property
    def settled(self) -> bool:
        return len(self._sorted) >= SETTLED

    @property
    def median(self) -> float:
        return self._sorted[len(self._sorted) // 2]

    @property
    def deviation(self) -> float:
        """The robust standard deviation."""
        count = len(self._sorted)
        return (self._sorted[3 * count // 4] - self._sorted[count // 4]) / _NORMAL


class Trend:
    """A number that drifts: where it is, and how far from there single values are."""

    def __init__(self) -> None:
        self._near, self._away = Window(NEAR), Window(WINDOW)

    def add(self, value: float) -> None:
        if self._near.settled:
            self._away.add(value - self._near.median)
        self._near.add(value)

    @property
    def settled(self) -> bool:
        return self._away.settled

    @property
    def usual(self) -> float:
        """NaN before there is one."""
        return self._near.median if self._near.settled else math.nan

    def deviations(self, value: float, least: float) -> float:
        """How many robust standard deviations, `least` at least, the value is away from what is usual."""
        return abs(value - self._near.median) / max(self._away.deviation, least, 1e-30)


class AnomalyWatch:
    """Looks at every iteration of one process.

    loss            more than `deviations` standard deviations from the median, or not finite.
    gradient_norm   the same of its logarithm, for norms differ by factors.
    throughput      tokens a second of computing under half of the median, in an iteration that takes longer than the median: a small batch is none.
    data_wait       seconds until the batch was there: more than half of what an iteration usually takes, and more than 10 ms.
    """

    def __init__(self, deviations: float = 5.0) -> None:
        self._deviations = deviations
        self.reset()

    def reset(self) -> None:
        """Forget everything: after a rollback the past is another."""
        self._loss, self._norm = Trend(), Trend()
        self._speed, self._computing, self._seconds = Window(), Window(), Window()

    def look(self, step: int, loss: float, norm: float, tokens: int, seconds: float, data_wait: float) -> list[Anomaly]:
        """What is extraordinary about this iteration; it counts among the usual ones from now on."""
        return [
            *self._outlier(step, "loss", loss, self._loss, logarithmic=False),
            *self._outlier(step, "gradient_norm", norm, self._norm, logarithmic=True),
            *self._slow(step, tokens, seconds - data_wait),
            *self._stalled(step, seconds, data_wait),
        ]

    def _outlier(self, step: int, quantity: str, value: float, trend: Trend, *, logarithmic: bool) -> Iterator[Anomaly]:
        usual = math.exp(trend.usual) if logarithmic else trend.usual
        if not math.isfinite(value):
            yield Anomaly(step, quantity, value, usual)
            return
        seen = math.log(max(value, 1e-30)) if logarithmic else value
        if trend.settled:
            away = trend.deviations(seen, _LEAST if logarithmic else _LEAST * abs(usual))
            if away > self._deviations:
                yield Anomaly(step, quantity, value, usual, round(away, 2))
        trend.add(seen)

    def _slow(self, step: int, tokens: int, computing: float) -> Iterator[Anomaly]:
        if computing <= 0 or tokens <= 0:
            return
        speed = tokens / computing
        if self._speed.settled and speed < _SLOW * self._speed.median and computing > self._computing.median:
            yield Anomaly(step, "throughput", round(speed, 1), round(self._speed.median, 1))
        self._speed.add(speed)
        self._computing.add(computing)

    def _stalled(self, step: int, seconds: float, data_wait: float) -> Iterator[Anomaly]:
        if self._seconds.settled and data_wait > max(_STALL * self._seconds.median, _STALL_SECONDS):
            yield Anomaly(step, "data_wait", data_wait, self._seconds.median)
        self._seconds.add(seconds)
