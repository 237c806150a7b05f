"""`residual_norm` in PyTorch: any dtype and device, twice differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import accumulation_dtype, not_needed
from cvmk.ops.reference._dropout import kept_rows
from cvmk.ops.residual_norm import Call, Out, sum_dtype


def _kept(c: Call) -> Tensor | None:
    """Which elements of the branch stay, in its shape; None where all do."""
    n = c.x.shape[-1]
    kept = kept_rows(c.dropout_seed, c.dropout_p, c.x.numel() // n, n)
    return None if kept is None else kept.view(c.x.shape)


def dropped(c: Call, values: Tensor) -> Tensor:
    """Values of the branch's shape with dropout."""
    kept = _kept(c)
    return values if kept is None else torch.where(kept, values / (1 - c.dropout_p), 0.0)


def forward(c: Call) -> Out:
    dtype = sum_dtype(c)
    wide = accumulation_dtype(dtype)
    total = c.x if c.branch is None else (c.x.to(wide) + dropped(c, c.branch.to(wide))).to(dtype)
    row = total.to(wide)
    mean = row.new_zeros((*row.shape[:-1], 1)) if c.rms else row.mean(-1, keepdim=True)
    centred = row - mean
    factor = (centred.square().mean(-1, keepdim=True) + c.eps).rsqrt()
    normed = centred * factor * c.weight.to(wide)
    if c.bias is not None:
        normed = normed + c.bias.to(wide)
    stats = torch.stack([mean.squeeze(-1), factor.squeeze(-1)]).detach() if c.keep_stats else not_needed(row)
    return Out(not_needed(total) if c.branch is None else total, normed.to(c.normed_dtype), stats)


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    wide = accumulation_dtype(sum_dtype(c))
    d = dweight = dbias = None
    if grads.normed is not None:
        mean, factor = saved.stats.unsqueeze(-1)
        grad, xh = grads.normed.to(wide), ((c.x if c.branch is None else saved.sum).to(wide) - mean) * factor
        g = grad * c.weight.to(wide)
        d = factor * (g - xh * (g * xh).mean(-1, keepdim=True)) if c.rms else factor * (g - g.mean(-1, keepdim=True) - xh * (g * xh).mean(-1, keepdim=True))
        n = c.x.shape[-1]
        dweight = (grad * xh).reshape(-1, n).sum(0).to(c.weight.dtype) if needs.weight else None
        dbias = grad.reshape(-1, n).sum(0).to(c.bias.dtype) if needs.bias and c.bias is not None else None
    if grads.sum is not None and c.branch is not None:
        d = grads.sum.to(wide) if d is None else d + grads.sum.to(wide)
    if d is None:
        return None, None, dweight, dbias
    dx = d.to(c.x.dtype, copy=True) if needs.x else None  # what an op returns shares no memory
    dbranch = dropped(c, d).to(c.branch.dtype, copy=True) if needs.branch and c.branch is not None else None
    return dx, dbranch, dweight, dbias


BACKENDS = (Backend("residual_norm", "reference", forward, backward),)
