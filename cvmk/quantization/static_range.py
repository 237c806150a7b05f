"""Static activation scales: the magnitude that 127 stands for in all inputs of a matrix, so that nothing is measured while the model runs.

    r = share * max_k max |x_k|,   share = 1.2, 1.1, ... 0.3:

the least mean squared error of the outputs, inputs rounded by r and saturated beyond it, is taken. As with SmoothQuant's alpha it is that on sentences which
r was not made of (the maximum of one half, rows of the other, and the other way round), so that there may be room above the largest input that
calibration saw. Only the share is chosen so: the maximum is that of all sentences. Without two sentences the share is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk.ops.quantize import rounded_rows
from cvmk.quantization.calibration import Half, InputStatistics

SHARES = tuple(round(1.2 - index / 20, 2) for index in range(19))
_SMALLEST = 1e-5


@torch.no_grad()
def input_range(weight: Tensor, rounded: Tensor, inputs: InputStatistics) -> Tensor:
    """r [1], float32, of inputs whose matrix W [N, K] has become `rounded` [N, K] (both times a smoothing scale where there is one; inputs over it)."""
    halves = [(largest(one), other.rows) for one, other in (inputs.halves, inputs.halves[::-1])]
    share, least = 1.0, float("inf")
    for tried in SHARES if all(len(rows) for _, rows in halves) else ():
        error = sum(_error(weight, rounded, rows, most * tried) for most, rows in halves)
        if error < least:
            share, least = tried, error
    return largest(inputs) * share


def largest(inputs: InputStatistics | Half) -> Tensor:
    """max |x| over all inputs, [1], float32."""
    return inputs.largest.max().clamp(min=_SMALLEST).float().view(1)


def _error(weight: Tensor, rounded: Tensor, rows: Tensor, span: Tensor) -> float:
    return float((rounded_rows(rows, span) @ rounded.float().T - rows @ weight.float().T).double().square().sum())
