"""`flash_attention` on the CPU kernels of csrc/attention: float32, and bfloat16 and float16 with sums in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs, make
from cvmk.ops._dropout import words
from cvmk.ops._storage import with_memory
from cvmk.ops.attention import Call, Out, row_bias_gradient
from cvmk.ops.native import library, reason
from cvmk.ops.native._memory import NUMBER

_NATIVE: Any = library()


def forward(c: Call) -> Out:
    """(out, lse) of `cvmk.ops.flash_attention`."""
    c = with_contiguous_rows(c)
    q, v = c.q, c.v
    # Sizes one by one: torch reads them twice as fast as a tuple.
    if c.cu_seqlens_q is None:
        batch, heads, rows, _ = q.shape
        out, lse = q.new_empty(batch, heads, rows, v.shape[3]), NUMBER.new_empty(batch, heads, rows)
    else:
        rows, heads, _ = q.shape
        out, lse = q.new_empty(rows, heads, v.shape[2]), NUMBER.new_empty(heads, rows)
    factor, key, limit = words(c.dropout_seed, c.dropout_p)
    _NATIVE.attention_forward(c, out, lse, factor, key, limit)
    return make(Out, (out, lse))


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and bias."""
    c = with_contiguous_rows(c)
    q, k, v, bias, out, lse = c.q, c.k, c.v, c.bias, saved.out.contiguous(), saved.lse.contiguous()
    grad_out = None if grads.out is None else rows_contiguous(grads.out)
    grad_lse = None if grads.lse is None else grads.lse.contiguous()
    fresh = _like if c.cu_seqlens_q is None else _zeros  # rows that belong to no packed sequence are in no item of work
    dq, dk, dv = fresh(q) if needs.q else None, fresh(k) if needs.k else None, fresh(v) if needs.v else None
    by_row, dbias = False, None
    if bias is not None and needs.bias:
        by_row = bias.dim() == 0 or bias.shape[-1] == 1
        dbias = row_bias_gradient(bias, lse, grad_lse) if by_row else torch.empty(bias.shape, dtype=bias.dtype)
    factor, key, limit = words(c.dropout_seed, c.dropout_p)
    _NATIVE.attention_backward(
        c, out, lse, factor, key, limit, grad_out, grad_lse, dq, dk, dv, None if by_row else dbias
    )  # fmt: skip
    return dq, dk, dv, dbias


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def _zeros(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape)


# -- arguments of the library -----------------------------------------------------------------------------------------------------
def with_contiguous_rows(c: Call) -> Call:
    """The call, with copies of q, k and v where their last dimension is not contiguous."""
    if c.q.is_contiguous() and c.k.is_contiguous() and (c.v is None or c.v.is_contiguous()):
        return c
    return c._replace(q=rows_contiguous(c.q), k=rows_contiguous(c.k), v=None if c.v is None else rows_contiguous(c.v))


def rows_contiguous(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension is not contiguous (a gradient may be an expanded number)."""
    return x if x.is_contiguous() or x.stride(-1) == 1 else with_memory(x).contiguous()


def unavailable() -> str | None:
    """Why these kernels cannot run in this process, or None."""
    return reason() if _NATIVE is None or hasattr(_NATIVE, "attention_forward") else "the native library was built without attention: install cvmk again"


BACKENDS = (
    Backend("flash_attention", "native", forward, backward, dtypes=(torch.float32, torch.bfloat16, torch.float16), devices=("cpu",), unavailable=unavailable),
)
