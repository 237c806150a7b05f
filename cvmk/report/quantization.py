"""The rows of a quantisation's report (quantization.json), for a page and for a terminal."""

from __future__ import annotations

from typing import Any

Rows = list[tuple[str, ...]]


def score_rows(report: dict[str, Any]) -> Rows:
    """Scores before and after, with intervals, and their difference; the first row is the header."""
    percent = f"{100 * report['evaluation']['confidence']:g}% interval"
    rows: Rows = [("metric", "before", percent, "after", percent, "difference", percent, "p")]
    for before, after, pair in zip(report["before"]["scores"], report["after"]["scores"], report["paired"], strict=True):
        spans = [f"[{score['low']:.2f}, {score['high']:.2f}]" for score in (before, after)]
        difference = (f"{pair['difference']:+.2f}", f"[{pair['low']:+.2f}, {pair['high']:+.2f}]", f"{pair['p_value']:.4f}")
        rows.append((str(before["metric"]), f"{before['value']:.2f}", spans[0], f"{after['value']:.2f}", spans[1], *difference))
    return rows


def layer_rows(report: dict[str, Any]) -> Rows:
    """Every matrix; the first row is the header."""
    rows: Rows = [("matrix", "stored", "bytes", "signal to noise, dB", "rounded to nearest")]
    for layer in report["layers"]:
        ratios = ("" if value is None else f"{value:.1f}" for value in (layer["snr"], layer["nearest_snr"]))
        rows.append((*(str(layer[key]) for key in ("name", "stored", "bytes")), *ratios))
    return rows


def facts(report: dict[str, Any]) -> list[str]:
    """Size, speed, recovery and what was kept in a higher precision, a line each."""
    sizes = report["sizes"]
    lines = [f"weights: {sizes['float32']} bytes in float32, {sizes['after']} now ({sizes['ratio']:.3f})"]
    rates = [report[when]["tokens_per_second"] for when in ("before", "after")]
    if None not in rates:
        lines.append(f"speed: {rates[0]:.0f} tokens/s before, {rates[1]:.0f} after")
    if recovery := report.get("recovery"):  # an older cvmk did not know it
        spans = [recovery["history"][0]["divergence"], min(one["divergence"] for one in recovery["history"])]
        lines.append(f"recovery: BLEU {recovery['unrecovered']:.2f} without it; divergence on held-out text {spans[0]:.4f} -> {spans[1]:.4f} nats a piece, "
                     f"best of {recovery['steps']} steps: {recovery['best']}")  # fmt: skip
    if report["raised"]:
        lines.append(f"in a higher precision: {', '.join(map(str, report['raised']))}")
    lines += [f"trial with {trial['raised']} raised: BLEU {trial['value']:.2f} ({-trial['drop']:+.2f})" for trial in report["trials"][:-1]]
    return lines
