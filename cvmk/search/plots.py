"""Plots of a search: its history, what its keys matter, and the scores over each key; PNG and SVG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from cvmk.files import write_bytes
from cvmk.search.study import COMPLETE, FAILED, PRUNED

if TYPE_CHECKING:
    from cvmk.search.result import SearchResult

FOLDER = "plots"
_COLOURS = {COMPLETE: "#2563eb", PRUNED: "#d97706", FAILED: "#dc2626"}
_MARKS = {COMPLETE: "o", PRUNED: "v", FAILED: "x"}
_COLUMNS = 3


def write_plots(result: SearchResult) -> str | None:
    """Write history, parameters and importances into plots/; a sentence where there are none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plots are drawn, for Matplotlib is not installed: pip install 'cvmk[search]'"
    drawn: dict[str, Any] = {"history": Figure(figsize=(8, 4.5), layout="constrained")}
    _history(drawn["history"], result)
    drawn["parameters"] = _parameters(Figure, result)
    if result.importances:
        drawn["importances"] = Figure(figsize=(8, 1 + 0.4 * len(result.importances)), layout="constrained")
        _importances(drawn["importances"], result.importances)
    for name, figure in drawn.items():
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150)
            (result.folder / FOLDER).mkdir(exist_ok=True)
            write_bytes(result.folder / FOLDER / f"{name}.{kind}", buffer.getvalue())
    return None


def _axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _history(figure: Any, result: SearchResult) -> None:
    """Every trial's score by its number, and the best until then."""
    axes = figure.subplots()
    _axes(axes)
    for state, colour in _COLOURS.items():
        found = [trial for trial in result.trials if trial.state == state]
        scored = [(trial.number, trial.value) for trial in found if trial.value is not None]
        if scored:
            axes.scatter(*zip(*scored, strict=True), s=28, color=colour, marker=_MARKS[state], label=f"{state} ({len(found)})")
        without = [trial.number for trial in found if trial.value is None]
        if without:
            label = None if scored else f"{state} ({len(found)})"
            axes.plot(without, [0.02] * len(without), _MARKS[state], color=colour, transform=axes.get_xaxis_transform(), label=label, linestyle="none")
    complete = [(trial.number, trial.value) for trial in result.trials if trial.state == COMPLETE and trial.value is not None]
    numbers: list[int] = []
    best: list[float] = []
    for number, value in complete:
        better = not best or (value < best[-1] if result.lower_is_better else value > best[-1])
        numbers.append(number)
        best.append(value if better else best[-1])
    axes.step([*numbers, result.trials[-1].number], [*best, best[-1]], where="post", color=_COLOURS[COMPLETE], linewidth=1, label="best so far")
    axes.set(xlabel="trial", ylabel=f"validation {result.metric}{' (lower is better)' if result.lower_is_better else ''}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)


def _parameters(figure: Any, result: SearchResult) -> Any:
    """The score over each key."""
    keys = list(result.importances) or list(result.best.parameters)
    columns = min(len(keys), _COLUMNS)
    rows = -(-len(keys) // columns)
    drawn = figure(figsize=(3.2 * columns + 0.6, 2.8 * rows), layout="constrained")
    grid = drawn.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    for place, (axes, key) in enumerate(zip(grid.flat, keys, strict=False)):
        _axes(axes)
        trials = [trial for trial in result.trials if key in trial.parameters and trial.value is not None]
        choices = result.ranges[key].choices
        shown: list[Any] = [trial.parameters[key] if choices is None else str(trial.parameters[key]) for trial in trials]
        if choices is not None:
            axes.plot([str(choice) for choice in choices], [result.best.value] * len(choices), alpha=0)  # their order
        for state, colour in _COLOURS.items():
            of_state = [(value, trial.value) for value, trial in zip(shown, trials, strict=True) if trial.state == state]
            if of_state:
                axes.scatter(*zip(*of_state, strict=True), s=18, color=colour, marker=_MARKS[state])
        best = result.best.parameters[key]
        axes.scatter([best if choices is None else str(best)], [result.best.value], s=90, facecolors="none", edgecolors="black", zorder=3)
        if result.ranges[key].log:
            _by_logarithm(axes)
        axes.set_xlabel(key)
        if place % columns == 0:
            axes.set_ylabel(f"validation {result.metric}")
    return drawn


def _by_logarithm(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _importances(figure: Any, importances: dict[str, float]) -> None:
    axes = figure.subplots()
    _axes(axes)
    names, shares = list(importances)[::-1], list(importances.values())[::-1]
    bars = axes.barh(names, shares, color=_COLOURS[COMPLETE], height=0.6)
    axes.bar_label(bars, labels=[f"{share:.2f}" for share in shares], padding=4)
    axes.set(xlabel="importance (PED-ANOVA)", xlim=(0, max(shares) * 1.12 or 1))
