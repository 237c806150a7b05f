"""AWQ (Lin et al. 2024, arXiv 2306.00978): inputs that are large on average get finer steps, by a scale that the layer before takes back; then
ranges are clipped.

    s = x^r  or  s = x^r / (w^(1 - r) + 1e-4),   r = 0, 0.05, ... 0.95,   s / sqrt(max s * min s),

x the mean |x_k|, w the mean of |W_nk| / (largest of its group) over the outputs of all readers: the s with the least E ||x W^T - (x / s) Q(W s)^T||^2 of all
readers together is taken, if it is less than without a scale. (The paper's error is that of a whole block; here it is that of the layers that read x.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvmk.ops import QuantizedWeight
from cvmk.quantization.calibration import InputStatistics
from cvmk.quantization.rounding import Grid

RATIOS = tuple(index / 20 for index in range(20))
SHRINKS = tuple(1 - index / 40 for index in range(20))  # 1 ... 0.525
_SMALLEST = 1e-4


@torch.no_grad()
def search_scale(weights: Sequence[Tensor], inputs: Sequence[InputStatistics], channels: Tensor, grid: Grid) -> Tensor | None:
    """The scale [channels] of the inputs that some weights [N_i, K] share, or None where none is better than none.

    `channels` [K] is the number of the scale that each input has.
    """
    count = int(channels.max()) + 1
    mean = _per_channel(torch.stack([one.mean for one in inputs]).mean(0), channels, count).clamp(min=_SMALLEST)
    sizes = [(grid.groups(w.double().abs()) / grid.groups(w.double().abs()).amax(-1, keepdim=True).clamp(min=1e-30)).flatten(1) for w in weights]
    size = _per_channel(torch.cat(sizes).mean(0), channels, count)
    best, least = None, _error(weights, inputs, None, grid)
    for ratio in RATIOS[1:]:
        for scale in (mean**ratio, mean**ratio / (size ** (1 - ratio) + _SMALLEST)):
            scale = scale / (scale.max() * scale.min()).sqrt()
            error = _error(weights, inputs, scale[channels], grid)
            if error < least:
                best, least = scale, error
    return best


@torch.no_grad()
def clip_ranges(weight: Tensor, moment: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, groups] of ranges that were shrunk to what makes e^T H e least, e the error of a group's weights when they are rounded to nearest
    and H the second moment of the group's inputs; of W [N, K] with inputs of second moment [K, K]."""
    groups = grid.groups(weight.double())
    blocks = torch.stack([moment[at : at + grid.group, at : at + grid.group].double() for at in range(0, weight.shape[1], grid.group)])
    scales, zeros = grid.fit(groups)
    least = torch.full(groups.shape[:2], torch.inf, dtype=torch.float64)
    for shrink in SHRINKS:
        some, at = grid.fit(groups, shrink)
        error = groups - grid.rounded(groups, some, at)
        loss = (torch.einsum("ngk,gkj->ngj", error, blocks) * error).sum(-1)
        better = loss < least
        least = torch.where(better, loss, least)
        scales, zeros = torch.where(better, some, scales), torch.where(better, at, zeros)
    return scales, zeros


def clipped(weight: Tensor, moment: Tensor, grid: Grid) -> QuantizedWeight:
    """W [N, K] rounded to nearest within the ranges of `clip_ranges`."""
    scales, zeros = clip_ranges(weight, moment, grid)
    return grid.weight(grid.values(grid.groups(weight.double()), scales, zeros).flatten(1), scales, zeros)


def _error(weights: Sequence[Tensor], inputs: Sequence[InputStatistics], scale: Tensor | None, grid: Grid) -> float:
    """The sum of E ||x W^T - (x / s) Q(W s)^T||^2 over the readers, by the second moments."""
    total = 0.0
    for weight, one in zip(weights, inputs, strict=True):
        wide = weight.double()
        scaled = wide if scale is None else wide * scale
        rounded = grid.rounded(grid.groups(scaled), *grid.fit(grid.groups(scaled))).flatten(1)
        error = wide - (rounded if scale is None else rounded / scale)
        total += float(((error @ one.moment) * error).sum())
    return total


def _per_channel(values: Tensor, channels: Tensor, count: int) -> Tensor:
    """The mean of the inputs of each channel."""
    return values.new_zeros(count).scatter_reduce(0, channels, values, "mean", include_self=False)
