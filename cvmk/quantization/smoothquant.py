"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): the range of large inputs is moved into the weights, whose scales are finer.

    s_k = max|x_k|^alpha / max_n |W_nk|^(1 - alpha),  at least 1e-5,  the maximum over the outputs of all readers of x;

alpha = 0, 0.05, ... 1: that with the least mean squared error of the readers' outputs, inputs and weights rounded as they will be, is taken, if
it is less than without a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvmk.ops.quantize import rounded_rows
from cvmk.quantization.calibration import InputStatistics
from cvmk.quantization.rounding import Grid

ALPHAS = tuple(index / 20 for index in range(21))
_SMALLEST = 1e-5


def scale_of(weights: Sequence[Tensor], largest: Tensor, alpha: float, channels: Tensor) -> Tensor:
    """The scale [channels] by the formula; `largest` [K] is max|x|, `channels` [K] the number of the scale that each input has."""
    count = int(channels.max()) + 1
    x = _per_channel(largest.double(), channels, count).clamp(min=_SMALLEST)
    w = _per_channel(torch.cat([weight.double().abs() for weight in weights]).amax(0), channels, count).clamp(min=_SMALLEST)
    return (x**alpha / w ** (1 - alpha)).clamp(min=_SMALLEST)


@torch.no_grad()
def search_scale(weights: Sequence[Tensor], inputs: Sequence[InputStatistics], channels: Tensor, grid: Grid) -> tuple[Tensor | None, float | None]:
    """The scale and its alpha for inputs that some weights [N_i, K] share; None and None where none is better than none."""
    largest = torch.stack([one.largest for one in inputs]).amax(0)
    best: tuple[Tensor | None, float | None] = (None, None)
    least = _error(weights, inputs, None, grid)
    for alpha in ALPHAS:
        scale = scale_of(weights, largest, alpha, channels)
        error = _error(weights, inputs, scale[channels], grid)
        if error < least:
            best, least = (scale, alpha), error
    return best


def _error(weights: Sequence[Tensor], inputs: Sequence[InputStatistics], scale: Tensor | None, grid: Grid) -> float:
    """The sum of squared errors of the readers' outputs on the rows that were kept, inputs rounded by tokens."""
    total = 0.0
    for weight, one in zip(weights, inputs, strict=True):
        w, x = (weight.float(), one.rows) if scale is None else (weight.float() * scale.float(), one.rows / scale.float())
        rounded = grid.rounded(grid.groups(w), *grid.fit(grid.groups(w))).flatten(1)
        total += float((rounded_rows(x) @ rounded.T - one.rows @ weight.float().T).double().square().sum())
    return total


def _per_channel(values: Tensor, channels: Tensor, count: int) -> Tensor:
    """The largest of the inputs of each channel."""
    return values.new_full((count,), -torch.inf).scatter_reduce(0, channels, values, "amax")
