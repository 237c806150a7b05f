"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): input after input is rounded, and those not yet rounded make good what that cost.

With H = E[x x^T] and U the upper Cholesky factor of its inverse, H^-1 = U^T U, the inputs k = 0, 1, ... in turn:

    q_k = round(w_k) on the grid,   e = (w_k - q_k) / U_kk,   w_j -= e U_kj  for j > k,

which minimises E ||x W^T - x Q^T||^2 given the inputs before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk.ops import QuantizedWeight
from cvmk.quantization.rounding import Grid

_BLOCK = 128


@torch.no_grad()
def gptq(
    weight: Tensor, moment: Tensor, grid: Grid, *, damping: float = 0.01, act_order: bool = True, static_groups: bool = True
) -> QuantizedWeight:
    """A quantised weight of W [N, K] whose inputs have the second moment H [K, K].

    damping        share of H's mean diagonal that is added to it; more is tried where H is then still not positive definite.
    act_order      inputs with the largest H_kk first.
    static_groups  scales come from W as it was, so that groups stay those of neighbouring inputs; otherwise from W as it has become when a group's first input
                   is reached, and with act_order the groups are of inputs in that order (`QuantizedWeight.order`).

    An input that was always zero (H_kk = 0) is rounded to nearest, for other text may wake it; the paper's code gives it zeros.
    Raises ValueError where H is not finite.
    """
    work, h = weight.double().clone(), moment.double().clone()
    columns = work.shape[1]
    if not torch.isfinite(h).all():
        raise ValueError("the second moments of a layer's inputs are not finite")
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0 if dead.all() else h.diagonal()[~dead].mean()  # it is alone in its row and column: nothing corrects it, and it nothing
    scales, zeros = grid.fit(grid.groups(work))
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    work, h = work[:, order], h[order][:, order]
    upper = _factor(h, damping)
    group_of = order // grid.group if static_groups or grid.bits == 8 else torch.arange(columns) // grid.group
    found = torch.empty_like(work)
    for start in range(0, columns, _BLOCK):
        stop = min(columns, start + _BLOCK)
        errors = work.new_zeros(len(work), stop - start)
        for k in range(start, stop):
            group = int(group_of[k])
            if grid.bits == 4 and not static_groups and k % grid.group == 0:  # a group never reaches beyond the block
                scales[:, group], zeros[:, group] = grid.fit(work[:, k : k + grid.group])
            column, scale, zero = work[:, k : k + 1], scales[:, group], zeros[:, group]
            found[:, k : k + 1] = grid.values(column, scale, zero)
            rounded = (found[:, k] - zero) * scale
            error = (work[:, k] - rounded) / upper[k, k]
            work[:, k:stop] -= error[:, None] * upper[k, k:stop]
            errors[:, k - start] = error
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    if grid.bits == 4 and not static_groups:
        return grid.weight(found, scales, zeros, order if act_order else None)
    return grid.weight(found[:, torch.argsort(order)], scales, zeros)


def _factor(h: Tensor, damping: float) -> Tensor:
    """U of H^-1 = U^T U, with more damping until there is one."""
    mean = h.diagonal().mean()
    while True:
        damped = h + torch.eye(len(h), dtype=h.dtype) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping = max(10 * damping, 1e-6)
