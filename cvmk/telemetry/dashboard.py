"""`TelemetryDashboard`: a run's events as TensorBoard scalars and as plots, while it goes on."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from cvmk.telemetry.curves import points
from cvmk.telemetry.plots import PlotProcess
from cvmk.telemetry.schema import Event, Iterations, Record, Resumed, Rollback, Serving, Start
from cvmk.telemetry.tensorboard import ScalarWriter

TENSORBOARD = "tensorboard"
_ROWS = 10
"""Of the iterations of one event that become scalars; TensorBoard shows a thousand of each."""
_LAST_SECONDS = 4.0


class TelemetryDashboard:
    """Subscribes to an `EventStream`: loss, learning rate, gradient norm, throughput, latency of an iteration, scores, and the use of processor, memory
    and GPU; of a service latency, throughput, sessions and rejections; under the names of `cvmk.telemetry.curves.points` (those without a / under train/).

    folder        of the run, where its events are written.
    tensorboard   write scalars to tensorboard/ in it.
    plots         the formats ("png", "svg") in which plots/curves.* in it are drawn, every `plots_every` seconds at most and at the end.

    Raises ConfigError where matplotlib is wanted and not installed, DataError where it cannot write; in a run that ends the subscription alone.
    """

    def __init__(self, folder: str | os.PathLike[str], *, tensorboard: bool = True, plots: Sequence[str] = (), plots_every: float = 60.0) -> None:
        self._writer = ScalarWriter(Path(folder) / TENSORBOARD) if tensorboard else None
        self._plots = PlotProcess(Path(folder), plots) if plots else None
        self._every, self._drawn = plots_every, time.monotonic()
        self._last: defaultdict[str, int] = defaultdict(lambda: -1)
        self._periods = 0

    def receive(self, record: Record) -> None:
        if self._writer is not None and record.event.RECORDED:
            self._scalars(self._writer, record)
        if self._plots is not None and not self._plots.busy and time.monotonic() - self._drawn >= self._every:
            self._drawn = time.monotonic()
            self._plots.start()

    def close(self) -> None:
        """Draw the end; a drawing that takes longer than some seconds is done by itself."""
        if self._writer is not None:
            self._writer.close()
        if self._plots is not None:
            end = time.monotonic() + _LAST_SECONDS
            if self._plots.wait(_LAST_SECONDS / 2):
                self._plots.start(idle=False)
                self._plots.wait(end - time.monotonic())

    def _scalars(self, writer: ScalarWriter, record: Record) -> None:
        event = record.event
        if isinstance(event, (Rollback, Resumed, Start)):
            step = event.to if isinstance(event, Rollback) else event.step
            self._last = defaultdict(lambda: -1, {name: min(last, step) for name, last in self._last.items()})
            writer.restart(step + 1, record.time)
        found: dict[int, dict[str, float]] = {}
        self._periods += isinstance(event, Serving)
        for name, step, value in points(event, self._periods):
            if step > self._last[name] and _chosen(event, step):
                self._last[name] = step
                found.setdefault(step, {})[name if "/" in name else f"train/{name}"] = value
        for step, values in found.items():
            writer.add(step, values, record.time)
        if found:
            writer.flush()


def _chosen(event: Event, step: int) -> bool:
    """Of many iterations every so-manieth, the last one among them."""
    return not isinstance(event, Iterations) or (event.step + len(event.loss) - 1 - step) % math.ceil(len(event.loss) / _ROWS) == 0
