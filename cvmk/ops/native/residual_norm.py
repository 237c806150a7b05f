"""`residual_norm` on the CPU kernels of csrc/norm: a row is read once a pass, sums over rows are float32 in an order of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs, make
from cvmk.ops._dropout import NO_DROPOUT, words
from cvmk.ops._storage import with_memory
from cvmk.ops.native import library, reason
from cvmk.ops.native._memory import LARGE, NUMBER, empty
from cvmk.ops.reference import residual_norm as reference
from cvmk.ops.residual_norm import Call, Out, sum_dtype

_NATIVE: Any = library()
TYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_SUM = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in TYPES}
_NO_STATS = torch.empty(0, dtype=torch.float32, device="cpu")
"""Results that nobody asked for, where no gradient is recorded (what autograd records is its own): two, for results of one call share no storage."""


def _contiguous(c: Call) -> Call:
    """The call without gaps in its tensors."""
    if c.x.is_contiguous() and (c.branch is None or c.branch.is_contiguous()) and c.weight.is_contiguous() and (c.bias is None or c.bias.is_contiguous()):
        return c
    tensors = [tensor if tensor is None else with_memory(tensor).contiguous() for tensor in c[:4]]
    return make(Call, (*tensors, *c[4:]))


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised, of the shape of x, which has no gaps."""
    if x.numel() * dtype.itemsize >= 4 * LARGE:  # below, malloc has warm pages more often than not
        return empty(x.shape, dtype)
    return torch.empty_like(x) if dtype == x.dtype else torch.empty_like(x, dtype=dtype)


def forward(c: Call) -> Out:
    c = _contiguous(c)
    x, dtype = c.x, c.x.dtype
    total = None if c.branch is None else _like(x, dtype if c.branch.dtype == dtype else sum_dtype(c))
    normed = _like(x, c.normed_dtype)
    stats = NUMBER.new_empty((2, *x.shape[:-1])) if c.keep_stats else None
    factor, key, limit = NO_DROPOUT if c.dropout_seed is None else words(c.dropout_seed, c.dropout_p)
    _NATIVE.residual_norm_forward(c, total, normed, stats, factor, key, limit)
    if total is None:
        total = x.new_empty(0) if c.keep_stats else _NO_SUM[dtype]
    return make(Out, (total, normed, _NO_STATS if stats is None else stats))


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    if grads.normed is None:  # nothing but dropout
        return reference.backward(grads, c, saved, needs)
    branch = c.branch  # of which only the shape is read
    c = _contiguous(c._replace(branch=None))
    x, weight, bias = c.x, c.weight, c.bias
    grad_sum = None if branch is None or grads.sum is None else grads.sum.contiguous()
    dx = _like(x, x.dtype) if needs.x else None
    dbranch = _like(x, branch.dtype) if needs.branch and branch is not None else None
    dweight = torch.empty_like(weight) if needs.weight else None
    dbias = torch.empty_like(bias) if needs.bias and bias is not None else None
    _NATIVE.residual_norm_backward(
        c, x if branch is None else saved.sum.contiguous(), saved.stats.contiguous(), grad_sum, grads.normed.contiguous(), dx, dbranch, dweight, dbias,
        *words(c.dropout_seed, c.dropout_p),
    )  # fmt: skip
    return dx, dbranch, dweight, dbias


def _limits(which: str, c: Call) -> list[str]:
    named = {"branch": c.branch, "weight": c.weight, "bias": c.bias}
    wrong = [name for name, tensor in named.items() if tensor is not None and tensor.dtype not in TYPES]
    return [f"{name} is float64" for name in wrong]


def unavailable() -> str | None:
    """Why these kernels cannot run in this process, or None."""
    there = _NATIVE is None or hasattr(_NATIVE, "residual_norm_forward")
    return reason() if there else "cvmk._native is an older build without residual_norm: install the package again"


BACKENDS = (Backend("residual_norm", "native", forward, backward, dtypes=TYPES, devices=("cpu",), limits=_limits, unavailable=unavailable),)
