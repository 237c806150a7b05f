"""`residual_norm`: what stands between two sublayers of a transformer, the residual sum with dropout and the norm of what comes next."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvmk.ops._call import make, number
from cvmk.ops._dropout import checked_probability, draw_seed
from cvmk.ops._dtypes import accumulation_dtype, autocast_dtype, not_needed
from cvmk.ops._op import Op
from cvmk.ops._watch import autocast_enabled

NORMS = ("layer", "rms")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def residual_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None = None, *, norm: str = "layer", eps: float = 1e-5, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(x + dropout(branch), norm(x + dropout(branch))): the residual stream behind a sublayer, and the input of the next one.

    x          [..., n] float64, float32, bfloat16 or float16: the residual stream.
    branch     [..., n], a floating dtype of its own: the sublayer's result. None: the norm alone, and the sum is x itself.
    weight     [n], bias [n] or None, any floating dtypes.
    norm       "layer": (s - mean) / sqrt(variance + eps) * weight + bias (Ba et al., arXiv 1607.06450);
               "rms":   s / sqrt(mean(s^2) + eps) * weight + bias (Zhang & Sennrich, arXiv 1910.07467).
    eps        0 or more.
    dropout_p  probability, in [0, 1), with which an element of branch is set to 0 (whatever it is); the others are divided by 1 - dropout_p.

    Returns the sum s [..., n] in the dtype that x + branch has, and its norm: in that dtype, under autocast in autocast's, for the next layer is a
    product. Everything between is computed in float32 (float64 for float64); the norm is that of s as its dtype holds it.

    Gradient. With r = 1 / sqrt(variance + eps), xh = (s - mean) r (mean 0 for rms), g = dnormed * weight, over a row:
        ds = dsum + r (g - mean(g) - xh mean(g xh))      (rms: without mean(g)),
        dx = ds,  dbranch = M ds / (1 - p),  dweight = sum_rows dnormed xh,  dbias = sum_rows dnormed,
    with M the mask of dropout. Sums over rows have one order: the same bits for any number of threads, and every time. The forward pass keeps the sum and
    two numbers a row; no mask is stored. As M is made again, so is a row read once in each pass.

    Dropout draws one seed from torch's generator for the device of x; element (i, j) of the rows, counted over all leading dimensions, is element
    (0, i, j) of the hash in `cvmk.ops._dropout`.

    Raises TypeError for a wrong dtype and for a number that asks for a gradient, ValueError for a wrong shape, device or number.
    """
    call = prepare(x, branch, weight, bias, norm=norm, eps=eps, dropout_p=dropout_p)
    if call.dropout_p > 0:
        call = call._replace(dropout_seed=draw_seed(x.device))
    total, normed, _ = op(call)
    return (x if branch is None else total), normed


class Call(NamedTuple):
    x: Tensor
    branch: Tensor | None
    weight: Tensor
    bias: Tensor | None
    dropout_seed: Tensor | None
    rms: bool
    eps: float
    dropout_p: float
    normed_dtype: torch.dtype
    keep_stats: bool


class Out(NamedTuple):
    sum: Tensor
    """Without elements where there is no branch."""
    normed: Tensor
    stats: Tensor
    """[2, ...]: the rows' means (0 for rms) and 1 / sqrt(variance + eps); without elements where no gradient is asked for."""


def sum_dtype(c: Call) -> torch.dtype:
    """The dtype of x + branch."""
    return c.x.dtype if c.branch is None or c.branch.dtype == c.x.dtype else torch.promote_types(c.x.dtype, c.branch.dtype)


def _fake_forward(c: Call) -> Out:
    total = not_needed(c.x) if c.branch is None else c.x.new_empty(c.x.shape, dtype=sum_dtype(c))
    stats = c.x.new_empty((2, *c.x.shape[:-1]) if c.keep_stats else (0,), dtype=accumulation_dtype(sum_dtype(c)))
    return Out(total, c.x.new_empty(c.x.shape, dtype=c.normed_dtype), stats)


def _stand_ins(c: Call, out: Out) -> tuple[Tensor | None, ...]:
    """Both passes' derivatives hang on x and branch by their sum alone: it stands for x, and nothing for branch, which need not stay."""
    if c.branch is None or c.x.dtype != out.sum.dtype:
        return c[:5]
    nothing = c.branch.new_zeros(()).expand(c.branch.shape)
    return out.sum, nothing.requires_grad_(c.branch.requires_grad), *c[2:5]


op = Op(
    "residual_norm",
    Call,
    Out,
    fake_forward=_fake_forward,
    differentiable=("x", "branch", "weight", "bias"),
    saved=("sum", "stats"),
    keeps="keep_stats",
    stand_ins=_stand_ins,
)


@op.prepared_by
def prepare(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None = None, *, norm: str = "layer", eps: float = 1e-5, dropout_p: float = 0.0
) -> Call:
    dtype, shape = x.dtype, x.shape
    if dtype not in _FLOATS:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, not {dtype}")
    if len(shape) < 1 or shape[-1] == 0:
        raise ValueError(f"x must be [..., n] with n of at least 1, not of shape {list(shape)}")
    if branch is not None and (branch.dtype != dtype or branch.shape != shape or branch.device != x.device):
        _check("branch", branch, x, shape)
        dtype = torch.promote_types(dtype, branch.dtype)
    columns = shape[-1:]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != columns or tensor.device != x.device):
            _check(name, tensor, x, columns)
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    eps, dropout_p = number("eps", eps), 0.0 if branch is None else checked_probability(dropout_p)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be 0 or more and finite, not {eps}")
    if autocast_enabled() and dtype != torch.float64:
        dtype = autocast_dtype(x) or dtype
    return make(Call, (x, branch, weight, bias, None, norm == "rms", eps, dropout_p, dtype, False))


def _check(name: str, tensor: Tensor, x: Tensor, shape: Any) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be of shape {list(shape)} as x {list(x.shape)} is, not {list(tensor.shape)}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, and x on {x.device}: move it there")
