"""Curves of a run as pictures, by matplotlib: `python -m cvmk.telemetry RUN png svg`.

A run that draws itself does so through a process of its own (`PlotProcess`), which gets the processor when nobody else wants it.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cvmk.errors import ConfigError, DataError
from cvmk.files import write_bytes
from cvmk.telemetry.curves import Curve, Curves
from cvmk.telemetry.events import EVENTS
from cvmk.telemetry.reading import read_events
from cvmk.telemetry.schema import Anomaly, Record, Rollback, Start

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER, NAME = "plots", "curves"
FORMATS = ("png", "svg")
_POINTS = 2000
"""Of a curve, at most: more cannot be seen."""
_SMOOTHED = 100
_FLAT = 1e-6
_MEBIBYTE = 1 << 20
IDLE = "CVMK_PLOTS_IDLE"
"""A variable of the environment: 1 lets the process that draws wait for whoever else wants the processor."""


class _Panel(NamedTuple):
    title: str
    curves: tuple[str, ...]
    """Names of `cvmk.telemetry.curves.points`; one that ends with / stands for all that begin so."""
    unit: float = 1.0
    """What is drawn is the value divided by this."""
    logarithmic: bool = False
    smoothed: bool = True


_PANELS = (
    _Panel("loss", ("loss",)),
    _Panel("scores, validation", ("validation/",)),
    _Panel("learning rate", ("learning_rate",), smoothed=False),
    _Panel("gradient norm", ("gradient_norm",), logarithmic=True),
    _Panel("target tokens/s", ("tokens_per_second",)),
    _Panel("ms an iteration", ("seconds", "data_wait"), 1e-3),
    _Panel("requests/s", ("service/requests", "service/failures", "service/rejections"), smoothed=False),
    _Panel("translations/s", ("service/translations/",), smoothed=False),
    _Panel("latency of the service, ms", ("service/queue_seconds/", "service/decode_seconds/", "service/first_text_seconds/"), 1e-3, smoothed=False),
    _Panel("open sessions", ("service/sessions",), smoothed=False),
    _Panel("processor: cores", ("process/cpu",)),
    _Panel("memory, MiB", ("process/memory",), _MEBIBYTE),
    _Panel("GPU: share busy", ("gpu*/use",)),
    _Panel("GPU memory, MiB", ("gpu*/memory",), _MEBIBYTE),
)


def check_matplotlib() -> None:
    """Raises ConfigError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots are drawn by matplotlib, which is not installed: pip install 'cvmk[plots]'")


def draw(run: str | os.PathLike[str], formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draw the curves of the run in a folder to plots/curves.FORMAT in it, each file whole or not at all; their names.

    Raises DataError where its events cannot be read or a picture cannot be written, ConfigError for another format and without matplotlib.
    """
    for one in formats:
        if one not in FORMATS:
            raise ConfigError(f"a plot cannot be {one!r}: its format is one of {', '.join(FORMATS)}")
    check_matplotlib()
    folder = Path(run)
    records, _ = read_events(folder / EVENTS)
    picture = _figure(folder.name, records)
    found = []
    for one in formats:
        data = io.BytesIO()
        picture.savefig(data, format=one, metadata={"Date": None} if one == "svg" else None)
        found.append(folder / FOLDER / f"{NAME}.{one}")
        write_bytes(found[-1], data.getvalue())
    return found


def _figure(name: str, records: Sequence[Record]) -> Figure:
    from matplotlib.figure import Figure

    series = Curves(records).series
    panels = [(panel, found) for panel in _PANELS if (found := _named(series, panel))]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(11, 2.6 * rows + 0.5), dpi=100, layout="constrained")
    title = next((record.event.title for record in reversed(records) if isinstance(record.event, Start)), "")
    figure.suptitle(f"{name}  {title}".strip())
    if not panels:
        figure.text(0.5, 0.4, "nothing to draw yet", ha="center")
    for number, (panel, found) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, number + 1)
        _draw_panel(axes, panel, found)
        for record in records:
            if isinstance(record.event, Rollback):
                axes.axvline(record.event.to, color="0.6", linestyle=":", linewidth=1)
        _mark_anomalies(axes, panel, series, records)
    return figure


def _named(series: dict[str, Curve], panel: _Panel) -> dict[str, Curve]:
    found = {}
    for wanted in panel.curves:
        head, star, tail = wanted.partition("*")
        for name, curve in series.items():
            matches = name.startswith(head) and name.endswith(tail) if star else name == wanted or (wanted.endswith("/") and name.startswith(wanted))
            if matches and any(map(math.isfinite, curve.values)):
                found[name] = curve
    return found


def _draw_panel(axes: Axes, panel: _Panel, curves: dict[str, Curve]) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    if panel.logarithmic and all(value > 0 for curve in curves.values() for value in curve.values if math.isfinite(value)):
        axes.set_yscale("log")
    for number, (name, curve) in enumerate(curves.items()):
        steps, values = curve.steps, [value / panel.unit for value in curve.values]
        color, label = f"C{number}", name.rpartition("/")[2] if name.startswith("validation/") else name
        if not panel.smoothed or len(steps) <= 2 * _SMOOTHED:
            axes.plot(*_thinned(steps, values), color=color, linewidth=1.3, label=label, marker="o" if len(steps) < 30 else None, markersize=3)
        else:
            axes.plot(*_thinned(steps, values), color=color, alpha=0.25, linewidth=0.6)
            axes.plot(*_thinned(steps, _smoothed(values)), color=color, linewidth=1.3, label=label)
    every = [value / panel.unit for curve in curves.values() for value in curve.values if math.isfinite(value)]
    if max(every) - min(every) < _FLAT * abs(max(every)):  # else rounding errors are drawn as mountains
        axes.set_ylim(every[0] - 0.1 * abs(every[0]), every[0] + 0.1 * abs(every[0]))
    if len(curves) > 1:
        axes.legend(fontsize=8)


def _mark_anomalies(axes: Axes, panel: _Panel, series: dict[str, Curve], records: Sequence[Record]) -> None:
    name = {"throughput": "tokens_per_second"}
    for quantity in ("loss", "gradient_norm", "throughput", "data_wait"):
        curve = name.get(quantity, quantity)
        if curve in panel.curves and curve in series:
            known = dict(zip(series[curve].steps, series[curve].values, strict=True))
            steps = [record.event.step for record in records if isinstance(record.event, Anomaly) and record.event.quantity == quantity]
            there = [(step, known[step] / panel.unit) for step in steps if math.isfinite(known.get(step, math.nan))]
            if there:
                axes.plot(*zip(*there, strict=True), "o", color="crimson", markersize=3)


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """The smallest and the largest value of each piece: spikes stay."""
    if len(steps) <= _POINTS:
        return list(steps), list(values)
    size = math.ceil(2 * len(steps) / _POINTS)
    kept: list[int] = []
    for start in range(0, len(steps), size):
        finite = [index for index in range(start, min(start + size, len(steps))) if math.isfinite(values[index])]
        if finite:
            kept += sorted({min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)})
    return [steps[index] for index in kept], [values[index] for index in kept]


def _smoothed(values: Sequence[float]) -> list[float]:
    """The exponential moving average over some hundredths of the curve, its beginning unbiased; what is not finite is passed over."""
    keep, mean, weight, found = 1 - 1 / max(10.0, len(values) / _SMOOTHED), 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        found.append(mean / weight if weight else math.nan)
    return found


class PlotProcess:
    """Draws the run in `folder` now and then, through one process at a time."""

    def __init__(self, folder: Path, formats: Sequence[str]) -> None:
        check_matplotlib()
        self._command = [sys.executable, "-m", "cvmk.telemetry", str(folder), *formats]
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None

    @property
    def busy(self) -> bool:
        """Whether it draws now. Raises DataError where the last drawing has failed."""
        if self._process is None:
            return False
        code = self._process.poll()
        if code is None:
            return True
        self._process = None
        with self._errors as file:
            file.seek(0)
            said = file.read().decode("utf-8", "replace").strip().splitlines()
        if code != 0:
            raise DataError(f"the plots were not drawn: {said[-1] if said else f'exit code {code}'}")
        return False

    def start(self, *, idle: bool = True) -> None:
        """Begin to draw; `idle`: only when nothing else wants the processor."""
        self._errors = tempfile.TemporaryFile()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", IDLE: "1" if idle else "0"}
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors, env=environment)

    def wait(self, seconds: float) -> bool:
        """Whether the drawing is done within so many seconds; it goes on where it is not. Raises DataError where it has failed."""
        end = time.monotonic() + seconds
        while self.busy:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True
