"""`flash_attention` on the CPU kernels of csrc/attention: float32, and bfloat16 and float16 with sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk.ops._dispatch import Backend, not_needed
from cvmk.ops.native import library, reason

_NATIVE = library()
_NO_DROPOUT = (1.0, 0, 0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    query_start: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_seed: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `cvmk.ops.flash_attention`."""
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    # Sizes one by one: torch reads them twice as fast as a tuple.
    if cu_seqlens_q is None:
        batch, heads, rows, _ = q.shape
        out, lse = q.new_empty(batch, heads, rows, v.shape[3]), q.new_empty(batch, heads, rows, dtype=torch.float32)
    else:
        rows, heads, _ = q.shape
        out, lse = q.new_empty(rows, heads, v.shape[2]), q.new_empty(heads, rows, dtype=torch.float32)
    factor, key, limit = _NO_DROPOUT if dropout_seed is None else _dropout(dropout_seed, dropout_p)
    _NATIVE.attention_forward(  # type: ignore[union-attr]
        q, k, v, bias, key_lengths, query_start, cu_seqlens_q, cu_seqlens_k, out, lse, window_left, window_right, softcap, scale, factor, key, limit
    )
    return out, lse


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    query_start: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and bias."""
    q, k, v, out, lse = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), out.contiguous(), lse.contiguous()
    grad_out = None if grad_out is None else rows_contiguous(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    fresh = _like if cu_seqlens_q is None else _zeros  # rows that belong to no packed sequence are in no item of work
    dq = fresh(q) if needs[0] else not_needed(q)
    dk = fresh(k) if needs[1] else not_needed(q)
    dv = fresh(v) if needs[2] else not_needed(q)
    want_bias = bias is not None and needs[3]
    by_row = want_bias and (bias.dim() == 0 or bias.shape[-1] == 1)  # type: ignore[union-attr]
    dbias = torch.empty(bias.shape, dtype=bias.dtype) if want_bias else not_needed(q)  # type: ignore[union-attr]
    factor, key, limit = _NO_DROPOUT if dropout_seed is None else _dropout(dropout_seed, dropout_p)
    _NATIVE.attention_backward(  # type: ignore[union-attr]
        q, k, v, bias, key_lengths, query_start, cu_seqlens_q, cu_seqlens_k, out, lse, window_left, window_right, softcap, scale, factor, key, limit,
        grad_out, grad_lse, dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None, dbias if want_bias and not by_row else None,
    )  # fmt: skip
    if by_row:
        dbias = _row_bias_gradient(bias, lse, grad_lse)  # type: ignore[arg-type]
    return dq, dk, dv, dbias


def _row_bias_gradient(bias: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Where one number is added to all scores of a row, probabilities stay and lse moves with it: sum_j dS_ij = g_i."""
    if grad_lse is None:
        return torch.zeros(bias.shape, dtype=bias.dtype)
    sums = torch.where(lse == -torch.inf, 0.0, grad_lse + lse * 0.0)
    sums = (sums if sums.dim() == 3 else sums[None])[..., None]
    return sums.sum_to_size((1,) * (4 - bias.dim()) + tuple(bias.shape)).reshape(bias.shape).to(bias.dtype)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def _zeros(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape)


# -- arguments of the library -----------------------------------------------------------------------------------------------------
def rows_contiguous(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension is not contiguous (a gradient may be an expanded number)."""
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def _dropout(seed: Tensor, p: float) -> tuple[float, int, int]:
    """1 / (1 - p), the generator's key and the limit under which an element is dropped; the docstring of the op has the formulas."""
    if p <= 0:
        return _NO_DROPOUT
    first, second = (int(word) & 0xFFFFFFFF for word in seed.tolist())
    return 1.0 / (1.0 - p), _mix(_mix(first) ^ second), int(p * 2**32)


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def unavailable() -> str | None:
    """Why these kernels cannot run in this process, or None."""
    return reason() if _NATIVE is None or hasattr(_NATIVE, "attention_forward") else "the native library was built without attention: install cvmk again"


BACKENDS = (
    Backend("flash_attention", "native", forward, backward, dtypes=(torch.float32, torch.bfloat16, torch.float16), devices=("cpu",), unavailable=unavailable),
)
