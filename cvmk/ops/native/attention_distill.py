"""`attention_kl` and `flash_attention_distill` on the CPU kernels of csrc/attention.

The teacher's log-sum-exps come first, from its queries and keys; then one pass over the student's scores gives its attention and, a block
at a time, the divergence from the teacher's mean map. Where the two dtypes differ, all is done in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops import attention
from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs, make
from cvmk.ops._dropout import NO_DROPOUT
from cvmk.ops._storage import with_memory
from cvmk.ops.attention_distill import Call, Out, maps_alone
from cvmk.ops.native import library
from cvmk.ops.native._memory import NUMBER
from cvmk.ops.native.attention import rows_contiguous, unavailable, with_contiguous_rows

_NATIVE: Any = library()
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def distill_forward(c: Call) -> Out:
    """(out, kl, lse, teacher_lse) of `cvmk.ops.flash_attention_distill`; out is None where v is."""
    student, teacher = _sides(c)
    q, v = student.q, student.v
    batch, heads, rows, _ = q.shape
    teacher_lse = NUMBER.new_empty(batch, teacher.q.shape[1], rows)
    _NATIVE.attention_forward(teacher, None, teacher_lse, *NO_DROPOUT)
    kl, lse = NUMBER.new_empty(batch, heads, rows), NUMBER.new_empty(batch, heads, rows)
    out = None if v is None else q.new_empty(batch, heads, rows, v.shape[3])
    _NATIVE.attention_forward(student, out, lse, *NO_DROPOUT, (teacher.q, teacher.k, teacher_lse, kl, None, c.teacher_scale))
    return make(Out, (out if out is None or out.dtype == c.q.dtype else out.to(c.q.dtype), kl, lse, teacher_lse))


def distill_backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    """The gradients of q, k and v."""
    student, teacher = _sides(c)
    lse, teacher_lse = saved.lse.contiguous(), saved.teacher_lse.contiguous()
    out = None if saved.out is None else saved.out.to(student.q.dtype).contiguous()
    grad_out = None if grads.out is None else rows_contiguous(grads.out.to(student.q.dtype))
    grad_kl = None if grads.kl is None else grads.kl.contiguous()
    grad_lse = None if grads.lse is None else grads.lse.contiguous()
    results = [torch.empty(t.shape, dtype=t.dtype) if t is not None and needed else None for t, needed in zip(student[:3], needs, strict=True)]
    _NATIVE.attention_backward(
        student, out, lse, *NO_DROPOUT, grad_out, grad_lse, *results, None, (teacher.q, teacher.k, teacher_lse, None, grad_kl, c.teacher_scale)
    )
    return tuple(results) if student.q.dtype == c.q.dtype else tuple([None if grad is None else grad.to(c.q.dtype) for grad in results])


# -- arguments of the library -----------------------------------------------------------------------------------------------------
def _sides(c: Call) -> tuple[attention.Call, attention.Call]:
    """What the student and the teacher attend to, in one dtype, as calls of `flash_attention`; the teacher's without values."""
    q, k, v, teacher_q, teacher_k, lengths, causal, scale, teacher_scale = c
    if q.dtype != teacher_q.dtype:
        q, k, teacher_q, teacher_k = [with_memory(x).float() for x in (q, k, teacher_q, teacher_k)]
        v = None if v is None else with_memory(v).float()
    return _call(q, k, v, lengths, causal, scale), _call(teacher_q, teacher_k, None, lengths, causal, teacher_scale)


def _call(q: Tensor, k: Tensor, v: Tensor | None, lengths: Tensor | None, causal: bool, scale: float) -> attention.Call:
    right = 0 if causal else attention.UNBOUNDED
    return with_contiguous_rows(make(attention.Call, (q, k, v, None, lengths, None, None, None, None, attention.UNBOUNDED, right, 0.0, scale, 0.0)))


def _limits(which: str, c: Call) -> list[str]:
    return [] if c.teacher_q.dtype in _FLOATS else [f"teacher_q is {c.teacher_q.dtype}, not one of {', '.join(str(d) for d in _FLOATS)}"]


def _backend(op: str, forward: Any, backward: Any) -> Backend:
    return Backend(op, "native", forward, backward, dtypes=_FLOATS, devices=("cpu",), limits=_limits, unavailable=unavailable)


BACKENDS = (_backend("attention_kl", *maps_alone(distill_forward, distill_backward)), _backend("flash_attention_distill", distill_forward, distill_backward))
