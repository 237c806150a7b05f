"""The curves of runs as charts, and as a table for whoever cannot see them."""

from __future__ import annotations

from collections.abc import Sequence

from cvmk.report.comparison import label
from cvmk.report.document import Cell, Chart, Charts, Line
from cvmk.report.history import Bin
from cvmk.report.run import Run

_POINTS = 4000
"""Points of all lines of a chart."""
_ROWS = 12
_WIDE = 50.0
"""A gradient norm that goes over more than this factor is drawn on a logarithmic axis."""


def charts_of(runs: Sequence[Run]) -> Charts:
    """Losses, scores, learning rate, gradient norm and speed, all runs in each; what nobody has is left out."""
    metrics = [str(run.setting("validation.metric", "bleu")) for run in runs] + [metric for run in runs for metric in _metrics(run)]
    charts = [
        _chart(runs, "loss", "Loss", "nats a token", band="from least to most of neighbouring iterations"),
        *(_chart(runs, f"validation/{one}", f"Validation: {label(one)}", "", dots=True, band=_band(runs, one)) for one in dict.fromkeys(metrics)),
        _chart(runs, "gradient_norm", "Gradient norm", "before clipping", logarithmic=True),
        _chart(runs, "learning_rate", "Learning rate", ""),
        _chart(runs, "tokens_per_second", "Training speed", "target tokens a second"),
        _chart(runs, "process/memory", "Memory of the process", "bytes"),
    ]
    if len(runs) == 1:
        charts.insert(1, _parts(runs[0]))
    names = [(run.name, at) for at, run in enumerate(runs)] if len(runs) > 1 else []
    return Charts([chart for chart in charts if chart.lines], names)


def _band(runs: Sequence[Run], metric: str) -> str:
    decides = any(run.setting("validation.metric", "bleu") == metric for run in runs)
    return "confidence interval" if decides and len(runs) <= 4 else ""


def _metrics(run: Run) -> list[str]:
    return [name.removeprefix("validation/") for name, curve in run.history.curves.items() if name.startswith("validation/") and curve.bins]


def _chart(runs: Sequence[Run], name: str, title: str, unit: str, *, band: str = "", dots: bool = False, logarithmic: bool = False) -> Chart:
    most = max(20, _POINTS // max(1, len(runs)))
    lines = [Line(run.name, thinned(bins, most), at) for at, run in enumerate(runs) if (bins := run.history.curve(name).bins)]
    if logarithmic:
        values = [one.mean for line in lines for one in line.bins]
        logarithmic = bool(values) and min(values) > 0 and max(values) > _WIDE * min(values)
    marks = [(rollback.step, f"went back to iteration {rollback.to}") for run in runs[:1] if len(runs) == 1 for rollback in run.history.rollbacks]
    spread_out = len(lines) <= 4 and any(one.low < one.high for line in lines for one in line.bins)
    return Chart(title, unit, lines, band if spread_out else "", marks, logarithmic, dots)


def _parts(run: Run) -> Chart:
    """The parts of a loss that has several."""
    parts = [name for name, curve in run.history.curves.items() if name.startswith("loss/") and curve.bins]
    lines = [Line(name.removeprefix("loss/").replace("_", " "), run.history.curve(name).bins, at + 1) for at, name in enumerate(parts)]
    return Chart("Parts of the loss", "unweighted", lines if len(lines) > 1 else [])


def thinned(bins: Sequence[Bin], most: int) -> list[Bin]:
    """At most so many bins, put together from neighbours."""
    step = -(-len(bins) // most)
    if step <= 1:
        return list(bins)
    found = []
    for start in range(0, len(bins), step):
        first, *others = bins[start : start + step]
        joined = Bin(first.first, first.last, first.mean, first.low, first.high, first.count, first.pass_)
        for other in others:
            joined.add(other.last, other.mean, other.low, other.high, other.count)
        found.append(joined)
    return found


def validation_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str | Cell]]]:
    """Header and rows: the scores at some of the validations."""
    several = len(runs) > 1
    metrics = list(dict.fromkeys(metric for run in runs for metric in _metrics(run)))
    rows: list[list[str | Cell]] = []
    for run in runs:
        curves = {metric: run.history.curve(f"validation/{metric}").last_pass() for metric in _metrics(run)}
        for step in spread(sorted({one.last for bins in curves.values() for one in bins}), _ROWS):
            found = {metric: next((one for one in bins if one.last == step), None) for metric, bins in curves.items()}
            cells = [_cell(found.get(metric)) for metric in metrics]
            rows.append([*([run.name] if several else []), str(step), *cells])
    return [*(["run"] if several else []), "iteration", *map(label, metrics)], rows


def spread(steps: Sequence[int], most: int) -> list[int]:
    """The first, the last, and as many between."""
    return list(steps) if len(steps) <= most else [steps[at * (len(steps) - 1) // (most - 1)] for at in range(most)]


def _cell(one: Bin | None) -> str:
    if one is None:
        return "–"
    return f"{one.mean:.2f}" if one.low == one.high else f"{one.mean:.2f} [{one.low:.1f}, {one.high:.1f}]"
