"""Plots of a study of mixers, PNG and SVG: quality by speed of training, what noise and prefixes do to it, and what a step of decoding costs by length."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvmk.cli._mixer_tables import Results, mean, speed
from cvmk.files import write_bytes

FOLDER = "plots"
NAMES = ("quality", "robustness", "prefixes", "step", "state")
_MARKERS, _DASHES = "osD^vP*X<>h", ("-", "--", ":")


def write_plots(done: Results, costs: Mapping[str, Any], work: Path) -> str | None:
    """Draw what patterns came to (results that did not diverge) and cost into WORK/plots; a sentence where nothing is drawn."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator
    except ImportError:
        return "no plots are drawn, for Matplotlib is not installed: pip install 'cvmk[search]'"
    figures = {name: Figure(figsize=(8, 5), layout="constrained") for name in NAMES}
    for figure in figures.values():
        figure.subplots().spines[["top", "right"]].set_visible(False)
    quality, robustness, prefixes, step, state = (figure.axes[0] for figure in figures.values())
    _quality(quality, done, costs["training"])
    _dots(robustness, {pattern: {name: mean(results, "noisy", name) for name in results[0]["noisy"]} for pattern, results in done.items()})
    robustness.set(xlabel="BLEU", title="sources as they are, with noise, and joined", xlim=(0, None))
    _dots(prefixes, {pattern: _kept(results) for pattern, results in done.items()})
    prefixes.set(xlabel="% of the words of a translation that stay", title="translations of the beginnings of sentences", xlim=(0, 100))
    for axes, key, title in ((step, "milliseconds", "milliseconds a token"), (state, "bytes", "bytes of state")):
        axes.set(xscale="log", yscale="log", xlabel="tokens of the source", ylabel=title)
        for at, pattern in enumerate(done):
            measured = costs["decoding"][pattern]
            axes.plot([int(length) for length in measured], [cost[key] for cost in measured.values()], **_style(at), label=pattern)
        lengths = [int(length) for length in next(iter(costs["decoding"].values()))]
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
    step.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    step.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    step.yaxis.set_minor_locator(NullLocator())
    (work / FOLDER).mkdir(exist_ok=True)
    # Text that is text, and the same file whenever it is made.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cvmk"}):
        for name, figure in figures.items():
            figure.axes[0].grid(alpha=0.25)
            figure.axes[0].set_axisbelow(True)
            figure.legend(*figure.axes[0].get_legend_handles_labels(), title="mixers", loc="outside right upper", frameon=False)
            for kind in ("png", "svg"):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
                write_bytes(work / FOLDER / f"{name}.{kind}", buffer.getvalue())
    return None


def _style(at: int) -> dict[str, Any]:
    """Of the pattern of this number: no two of the first hundred look alike."""
    return {"color": f"C{at % 10}", "marker": _MARKERS[at % len(_MARKERS)], "linestyle": _DASHES[at // 10 % len(_DASHES)], "markersize": 6, "linewidth": 1.3}


def _quality(axes: Any, done: Results, training: Mapping[str, Any]) -> None:
    from cvmk.validation.metrics import score

    for at, (pattern, results) in enumerate(done.items()):
        rate = speed(pattern, training)
        bleu = [score("bleu", one["hypotheses"], one["references"]).value for one in results]
        axes.plot([rate] * len(bleu), bleu, **_style(at) | {"linestyle": "none"}, label=pattern)
        axes.annotate(pattern, (rate, max(bleu)), xytext=(5, 5), textcoords="offset points", fontsize="small")
    axes.set(xlabel="training, target tokens a second", ylabel="BLEU")


def _kept(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By what came behind the beginning of a sentence, the percentage of its translation that stayed."""
    words = {"with the next word": ("stability", "next"), "to the end, from any word": ("stability", "whole")}
    cuts = {f"to the end, from the {name}": ("cuts", name, "kept") for name in results[0]["cuts"] if name != "whole"}
    return {name: 100 * mean(results, *keys) for name, keys in (words | cuts).items()}


def _dots(axes: Any, values: Mapping[str, Mapping[str, float]]) -> None:
    """A band for each name from above, and in it a line of its own for each pattern."""
    names = [*next(iter(values.values()))]
    for at, (pattern, of) in enumerate(values.items()):
        lower = 0.8 * ((at + 0.5) / len(values) - 0.5)
        axes.plot([of[name] for name in names], [row + lower for row in range(len(names))], **_style(at) | {"linestyle": "none"}, label=pattern)
    for row in range(0, len(names), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="black", alpha=0.04, linewidth=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
