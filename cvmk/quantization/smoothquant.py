"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): the range of large inputs is moved into the weights, whose scales are finer.

    s_k = max|x_k|^alpha / max_n |W_nk|^(1 - alpha),  at least 1e-5,  the maximum over the outputs of all readers of x;

alpha = 0, 0.05, ... 1: that with the least mean squared error of the readers' outputs, inputs and weights rounded as they will be, is taken, if
it is less than without a scale.

An input that was small or zero on the calibration text (a unit behind a relu that nothing woke) would get a small s_k, and where another text wakes it,
x_k / s_k would take the steps from all other inputs of its row. Hence two guards that the paper does not have: max|x_k| counts as at least half the median of
those that are not zero; and the error is that on sentences which the scale was not made of (scales of each half tried on the other). Only alpha
is chosen so: the scale that is used is made of all sentences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvmk.ops.quantize import rounded_rows
from cvmk.quantization.calibration import Half, InputStatistics
from cvmk.quantization.rounding import Grid

ALPHAS = tuple(index / 20 for index in range(21))
_SMALLEST = 1e-5
_ASLEEP = 0.5  # of the median of max|x_k|: an input below it is taken to be one that calibration did not see at its largest


def scale_of(weights: Sequence[Tensor], largest: Tensor, alpha: float, channels: Tensor) -> Tensor:
    """The scale [channels] by the formula; `largest` [K] is max|x|, `channels` [K] the number of the scale that each input has."""
    count = int(channels.max()) + 1
    x = _per_channel(largest.double(), channels, count)
    x = x.clamp(min=max(_SMALLEST, _ASLEEP * float(x[x > 0].median()) if bool((x > 0).any()) else 0.0))
    w = _per_channel(torch.cat([weight.double().abs() for weight in weights]).amax(0), channels, count).clamp(min=_SMALLEST)
    return (x**alpha / w ** (1 - alpha)).clamp(min=_SMALLEST)


@torch.no_grad()
def search_scale(
    weights: Sequence[Tensor], inputs: Sequence[InputStatistics], channels: Tensor, grid: Grid, static: bool = False
) -> tuple[Tensor | None, float | None]:
    """The scale and its alpha for inputs that some weights [N_i, K] share; None and None where none is better than none, and where there are no two
    sentences to try a scale on. `static`: inputs are rounded by one magnitude, the largest of the half that the scale is made of, and not by tokens."""
    seen, held = ([[one.halves[index] for one in inputs] for index in order] for order in ((0, 1), (1, 0)))
    folds = [(_largest(fitted), [half.rows for half in tried]) for fitted, tried in zip(seen, held, strict=True)]
    if not all(len(rows) for _, tried in folds for rows in tried):
        return None, None

    def error_of(alpha: float | None) -> float:
        total = 0.0
        for largest, rows in folds:
            scale = None if alpha is None else scale_of(weights, largest, alpha, channels)[channels]
            span = (largest if scale is None else largest / scale).max().float().view(1) if static else None
            total += _error(weights, rows, scale, grid, span)
        return total

    best, least = None, error_of(None)
    for alpha in ALPHAS:
        error = error_of(alpha)
        if error < least:
            best, least = alpha, error
    return (None, None) if best is None else (scale_of(weights, _largest(inputs), best, channels), best)


def _largest(inputs: Sequence[InputStatistics] | Sequence[Half]) -> Tensor:
    """max |x| [K] over all readers."""
    return torch.stack([one.largest for one in inputs]).amax(0)


def _error(weights: Sequence[Tensor], inputs: Sequence[Tensor], scale: Tensor | None, grid: Grid, span: Tensor | None = None) -> float:
    """The sum of squared errors of the readers' outputs on rows of inputs [n, K], inputs rounded by tokens, or by a magnitude [1]."""
    total = 0.0
    for weight, rows in zip(weights, inputs, strict=True):
        w, x = (weight.float(), rows) if scale is None else (weight.float() * scale.float(), rows / scale.float())
        rounded = grid.rounded(grid.groups(w), *grid.fit(grid.groups(w))).flatten(1)
        total += float((rounded_rows(x, span) @ rounded.T - rows @ weight.float().T).double().square().sum())
    return total


def _per_channel(values: Tensor, channels: Tensor, count: int) -> Tensor:
    """The largest of the inputs of each channel."""
    return values.new_full((count,), -torch.inf).scatter_reduce(0, channels, values, "amax")
