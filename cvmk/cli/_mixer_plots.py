"""Plots of a study of mixers, PNG and SVG: quality by speed of training, and what a step of decoding costs by the length of the source."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvmk.files import write_bytes

FOLDER = "plots"


def write_plots(done: Mapping[str, Sequence[dict[str, Any]]], work: Path) -> str | None:
    """Draw what patterns came to (results that did not diverge, one a seed) into WORK/plots; a sentence where nothing is drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plots are drawn, for Matplotlib is not installed: pip install 'cvmk[search]'"
    if not done:
        return None
    from cvmk.validation.metrics import score

    quality = Figure(figsize=(7, 4.5), layout="constrained")
    axes = _axes(quality, "training, target tokens a second", "BLEU")
    for pattern, results in done.items():
        speeds = [one["tokens_per_second"] for one in results]
        axes.scatter(speeds, [score("bleu", one["hypotheses"], one["references"]).value for one in results], s=30, label=pattern)
    axes.legend(title="mixers", fontsize="small")
    figures = {"quality": quality}
    for name, key, title in (("step", "milliseconds", "milliseconds a token"), ("state", "bytes", "bytes of state")):
        figures[name] = Figure(figsize=(7, 4.5), layout="constrained")
        axes = _axes(figures[name], "tokens of the source", title)
        axes.set(xscale="log", yscale="log")
        for pattern, results in done.items():
            costs = results[0]["costs"]
            axes.plot([int(length) for length in costs], [cost[key] for cost in costs.values()], marker="o", label=pattern)
        axes.legend(title="mixers", fontsize="small")
    (work / FOLDER).mkdir(exist_ok=True)
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150)
            write_bytes(work / FOLDER / f"{name}.{kind}", buffer.getvalue())
    return None


def _axes(figure: Any, x: str, y: str) -> Any:
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return axes
