"""The tables of a study of mixers, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_SAMPLES = 1000
Results = Mapping[str, Sequence[dict[str, Any]]]
"""By pattern one result a seed."""


def whole(found: Results) -> dict[str, list[dict[str, Any]]]:
    """The results of trainings that did not diverge, of patterns that have any."""
    done = {pattern: [one for one in results if one["diverged"] is None] for pattern, results in found.items()}
    return {pattern: results for pattern, results in done.items() if results}


def tables(found: Results, costs: Mapping[str, Any] | None) -> str:
    """What patterns came to and, where they were measured, cost. Differences are to the first of them, intervals bootstraps over sentences."""
    done = whole(found)
    parts = [_quality(done), _robustness(done), _cuts(done), _streams(done)] if done else []
    if costs is not None:
        parts += [_training(done, costs["training"]), _decoding(done, costs["decoding"])]
    parts.append([f"{pattern}: {one['diverged']}" for pattern, results in found.items() for one in results if one["diverged"] is not None])
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def mean(results: Sequence[dict[str, Any]], *keys: str) -> float:
    """Over seeds, of the number that these keys lead to."""
    values: list[Any] = [*results]
    for key in keys:
        values = [value[key] for value in values]
    return float(statistics.fmean(values))


def speed(pattern: str, training: Mapping[str, Any]) -> float:
    """Target tokens a second of the median training step."""
    rates: list[float] = [tokens / seconds for tokens, seconds in zip(training["tokens"], training["seconds"][pattern], strict=True)]
    return statistics.median(rates)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


def _quality(done: Results) -> list[str]:
    from cvmk.validation.bootstrap import interval_of, paired_of
    from cvmk.validation.metrics import measure

    rows, first = [], None
    for pattern, results in done.items():
        # All seeds as one corpus: their translations one after the other, each beside the same references.
        said = [text for one in results for text in one["hypotheses"]]
        references = [text for one in results for text in one["references"]]
        bleu, chrf = (measure(metric, said, references) for metric in ("bleu", "chrf"))
        low, high = interval_of(bleu, _SAMPLES)
        difference = ""
        if first is None:
            first = bleu
        elif first.sentences == bleu.sentences:
            pair = paired_of(bleu, first, _SAMPLES)
            difference = f"{pair.difference:+.2f} ({pair.low:+.2f} to {pair.high:+.2f})"
        score = f"{bleu.score.value:.2f} ({low:.1f}–{high:.1f})"
        rows.append((pattern, results[0]["ffn"], results[0]["parameters"], score, difference, f"{chrf.score.value:.2f}"))
    return _table(("mixers", "ffn", "parameters", "BLEU (95 %)", "beside the first (95 %)", "chrF"), rows)


def _robustness(done: Results) -> list[str]:
    names = [*next(iter(done.values()))[0]["noisy"]]
    return _table(("BLEU of sources", *names), [(pattern, *(f"{mean(results, 'noisy', name):.2f}" for name in names)) for pattern, results in done.items()])


def _cuts(done: Results) -> list[str]:
    names = [*next(iter(done.values()))[0]["cuts"]]
    heads = [f"{name}: {what}" for name in names for what in ("BLEU without brevity", "length", "kept")[: 2 if name == "whole" else 3]]
    rows = []
    for pattern, results in done.items():
        cells = [pattern]
        for name in names:
            cells += [f"{mean(results, 'cuts', name, 'bleu'):.2f}", f"{mean(results, 'cuts', name, 'length'):.2f}"]
            cells += [] if name == "whole" else [f"{mean(results, 'cuts', name, 'kept'):.1%}"]
        rows.append(cells)
    return _table(("cut sources", *heads), rows)


def _streams(done: Results) -> list[str]:
    heads = ("streams", "LAAL, words (wait-3)", "BLEU (wait-3)", "NE (retranslation)", "kept with the next word", "kept to the end")
    rows = [
        (
            pattern, f"{mean(results, 'laal'):.2f}", f"{mean(results, 'wait_bleu'):.2f}", f"{mean(results, 'erasure'):.3f}",
            f"{mean(results, 'stability', 'next'):.1%}", f"{mean(results, 'stability', 'whole'):.1%}",
        )
        for pattern, results in done.items()
    ]  # fmt: skip
    return _table(heads, rows)


def _training(done: Results, training: Mapping[str, Any]) -> list[str]:
    """The ratio is the median of what it is in each round: what disturbs a round disturbs it for all."""
    first, rows = training["seconds"][next(iter(done))], []
    for pattern in done:
        ratio = statistics.median(own / other for own, other in zip(training["seconds"][pattern], first, strict=True))
        rows.append((pattern, f"{speed(pattern, training):.0f}", f"{ratio:.2f}"))
    return _table(("training", "target tokens/s", "time of a step, first = 1"), rows)


def _decoding(done: Results, decoding: Mapping[str, Any]) -> list[str]:
    lengths = [*next(iter(decoding.values()))]
    heads = ("decoding, by tokens of the source", *(f"{length}: ms a token" for length in lengths), *(f"{length}: bytes of state" for length in lengths))
    rows = []
    for pattern in done:
        costs = decoding[pattern]
        rows.append((pattern, *(f"{costs[length]['milliseconds']:.2f}" for length in lengths), *(costs[length]["bytes"] for length in lengths)))
    return _table(heads, rows)
