"""`flash_attention` on the CPU kernels of csrc/attention: float32, and bfloat16 and float16 with sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk.ops._dispatch import Backend, not_needed
from cvmk.ops.native import library, reason

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_NATIVE = library()


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
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    sizes = _sizes(q, k, v, cu_seqlens_q)
    _, batch, heads, _, rows, _, _, width, sequences = sizes
    # Sizes one by one: torch reads them twice as fast as a tuple.
    if sequences < 0:
        out, lse = q.new_empty(batch, heads, rows, width), q.new_empty(batch, heads, rows, dtype=torch.float32)
    else:
        out, lse = q.new_empty(rows, heads, width), q.new_empty(heads, rows, dtype=torch.float32)
    _NATIVE.attention_forward(  # type: ignore[union-attr]
        *sizes, *strided(q), *strided(k), *strided(v), out.data_ptr(), lse.data_ptr(),
        None if bias is None else _bias(bias, None), integers(key_lengths), integers(query_start), integers(cu_seqlens_q), integers(cu_seqlens_k),
        window_left, window_right, softcap, scale, *_dropout(dropout_seed, dropout_p),
    )  # fmt: skip
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
    # Rows that belong to no packed sequence are in no item of work.
    fresh = Tensor.new_empty if cu_seqlens_q is None else Tensor.new_zeros
    dq, dk, dv = [fresh(t, *t.shape) if needed else not_needed(t) for t, needed in zip((q, k, v), needs, strict=False)]
    want_bias = bias is not None and needs[3]
    by_row = want_bias and (bias.dim() == 0 or bias.shape[-1] == 1)  # type: ignore[union-attr]
    dbias = torch.empty(bias.shape, dtype=bias.dtype) if want_bias else not_needed(q)  # type: ignore[union-attr]
    _NATIVE.attention_backward(  # type: ignore[union-attr]
        *_sizes(q, k, v, cu_seqlens_q), *strided(q), *strided(k), *strided(v), out.data_ptr(), lse.data_ptr(),
        None if bias is None else _bias(bias, dbias if want_bias and not by_row else None),
        integers(key_lengths), integers(query_start), integers(cu_seqlens_q), integers(cu_seqlens_k),
        window_left, window_right, softcap, scale, *_dropout(dropout_seed, dropout_p),
        *((0, 0, 0, 0) if grad_out is None else strided(grad_out)), 0 if grad_lse is None else grad_lse.data_ptr(),
        dq.data_ptr() if needs[0] else 0, dk.data_ptr() if needs[1] else 0, dv.data_ptr() if needs[2] else 0,
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


# -- arguments of the library -----------------------------------------------------------------------------------------------------
def rows_contiguous(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension is not contiguous (a gradient may be an expanded number)."""
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def strided(x: Tensor) -> tuple[int, int, int, int]:
    """Pointer and strides [batch, heads, rows] of [B, H, T, n], or of packed [total, H, n] with a batch stride of 0."""
    stride = x.stride()
    return (x.data_ptr(), *stride[:3]) if len(stride) == 4 else (x.data_ptr(), 0, stride[1], stride[0])


def integers(x: Tensor | None) -> tuple[int, int, int] | None:
    """Pointer, stride and whether the numbers have 64 bits."""
    return None if x is None else (x.data_ptr(), x.stride(0), x.dtype == torch.int64)


def _sizes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    if cu_seqlens is not None:
        rows, heads, d = q.shape
        return DTYPES[q.dtype], 1, heads, k.shape[1], rows, k.shape[0], d, v.shape[2], cu_seqlens.shape[0] - 1
    batch, heads, rows, d = q.shape
    _, kv_heads, keys, dv = v.shape
    return DTYPES[q.dtype], batch, heads, kv_heads, rows, keys, d, dv, -1


def _bias(bias: Tensor, grad: Tensor | None) -> tuple[int, ...]:
    wide = bias.view((1,) * (4 - bias.dim()) + tuple(bias.shape)) if bias.dim() < 4 else bias
    strides = (stride if size > 1 else 0 for size, stride in zip(wide.shape, wide.stride(), strict=True))
    return bias.data_ptr(), 0 if grad is None else grad.data_ptr(), DTYPES[bias.dtype], *strides, *wide.shape


def _dropout(seed: Tensor | None, p: float) -> tuple[float, int, int]:
    """1 / (1 - p), the generator's key and the limit under which an element is dropped; the docstring of the op has the formulas."""
    if seed is None or p <= 0:
        return 1.0, 0, 0
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
