"""`attention_kl` and `flash_attention_distill` on the CPU kernels of csrc/attention.

The teacher's log-sum-exps come first, from its queries and keys; then one pass over the student's scores gives its attention and, a block
at a time, the divergence from the teacher's mean map. Where the two dtypes differ, all is done in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvmk.ops._dispatch import Backend, not_needed
from cvmk.ops.native import library
from cvmk.ops.native.attention import rows_contiguous, unavailable

_NATIVE = library()
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def distill_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    teacher_q: Tensor,
    teacher_k: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    teacher_scale: float,
) -> tuple[Tensor, ...]:
    """(out, kl, lse, teacher_lse) of `cvmk.ops.flash_attention_distill`; out has no elements where v is None."""
    dtype = q.dtype
    q, k, v, teacher_q, teacher_k = _of_one_dtype(q, k, v, teacher_q, teacher_k)
    batch, heads, rows, _ = q.shape
    teacher_lse = q.new_empty(batch, teacher_q.shape[1], rows, dtype=torch.float32)
    _NATIVE.attention_forward(*_common(teacher_q, teacher_k, None, None, teacher_lse, key_lengths, causal, teacher_scale))  # type: ignore[union-attr]
    kl, lse = q.new_empty(batch, heads, rows, dtype=torch.float32), q.new_empty(batch, heads, rows, dtype=torch.float32)
    out = q.new_empty(batch, heads, rows, 0 if v is None else v.shape[3])
    teacher = (teacher_q, teacher_k, teacher_lse, kl, None, teacher_scale)
    _NATIVE.attention_forward(*_common(q, k, v, out, lse, key_lengths, causal, scale), teacher)  # type: ignore[union-attr]
    return out if out.dtype == dtype else out.to(dtype), kl, lse, teacher_lse


def distill_backward(
    grad_out: Tensor | None,
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    grad_teacher_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    teacher_q: Tensor,
    teacher_k: Tensor,
    key_lengths: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    teacher_lse: Tensor,
    causal: bool,
    scale: float,
    teacher_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dtype = q.dtype
    q, k, v, teacher_q, teacher_k = _of_one_dtype(q, k, v, teacher_q, teacher_k)
    lse, teacher_lse = lse.contiguous(), teacher_lse.contiguous()
    out, grad_out = None if out is None else out.to(q.dtype).contiguous(), None if grad_out is None else rows_contiguous(grad_out.to(q.dtype))
    grad_kl = None if grad_kl is None else grad_kl.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    wanted = (*needs[:2], v is not None and needs[2])
    grads = [torch.empty(t.shape, dtype=t.dtype) if t is not None and needed else not_needed(lse) for t, needed in zip((q, k, v), wanted, strict=True)]
    _NATIVE.attention_backward(  # type: ignore[union-attr]
        *_common(q, k, v, out, lse, key_lengths, causal, scale), grad_out, grad_lse,
        *(grad if needed else None for grad, needed in zip(grads, wanted, strict=True)), None,
        (teacher_q, teacher_k, teacher_lse, None, grad_kl, teacher_scale),
    )  # fmt: skip
    dq, dk, dv = (grad.to(dtype) for grad in grads)
    return dq, dk, dv


def kl_forward(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    teacher_scale: float,
) -> tuple[Tensor, ...]:
    """(kl, lse, teacher_lse) of `cvmk.ops.attention_kl`."""
    return distill_forward(student_q, student_k, None, teacher_q, teacher_k, key_lengths, causal, scale, teacher_scale)[1:]


def kl_backward(
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    grad_teacher_lse: Tensor | None,
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    key_lengths: Tensor | None,
    lse: Tensor,
    teacher_lse: Tensor,
    causal: bool,
    scale: float,
    teacher_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of student_q and student_k."""
    dq, dk, _ = distill_backward(
        None, grad_kl, grad_lse, None, student_q, student_k, None, teacher_q, teacher_k, key_lengths, None, lse, teacher_lse,
        causal, scale, teacher_scale, [*needs[:2], False],
    )  # fmt: skip
    return dq, dk


# -- arguments of the library -----------------------------------------------------------------------------------------------------
def _of_one_dtype(q: Tensor, k: Tensor, v: Tensor | None, teacher_q: Tensor, teacher_k: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    if q.dtype != teacher_q.dtype:
        q, k, teacher_q, teacher_k = q.float(), k.float(), teacher_q.float(), teacher_k.float()
        v = None if v is None else v.float()
    return rows_contiguous(q), rows_contiguous(k), None if v is None else rows_contiguous(v), rows_contiguous(teacher_q), rows_contiguous(teacher_k)


def _common(q: Tensor, k: Tensor, v: Tensor | None, out: Tensor | None, lse: Tensor, key_lengths: Tensor | None, causal: bool, scale: float) -> tuple[Any, ...]:
    """The arguments of `attention_forward` in csrc/bindings/attention.cpp."""
    return q, k, v, None, key_lengths, None, None, None, out, lse, -1, 0 if causal else -1, 0.0, scale, 1.0, 0, 0


def _limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    teacher: Tensor = arguments["teacher_q"]
    return [] if teacher.dtype in _FLOATS else [f"teacher_q is {teacher.dtype}, not one of {', '.join(str(d) for d in _FLOATS)}"]


BACKENDS = (
    Backend("attention_kl", "native", kl_forward, kl_backward, dtypes=_FLOATS, devices=("cpu",), limits=_limits, unavailable=unavailable),
    Backend("flash_attention_distill", "native", distill_forward, distill_backward, dtypes=_FLOATS, devices=("cpu",), limits=_limits, unavailable=unavailable),
)
