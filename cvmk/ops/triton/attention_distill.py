"""`attention_kl` and `flash_attention_distill` in Triton: float32, bfloat16 and float16 on either side, sums in float32, head sizes up to 256.

Where a student head is compared with one teacher head, one launch does it all; with a mean of several maps, the teacher's log-sum-exps come
first. Backward: the gradient of the queries, then that of keys and values, each with the teacher's map computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import triton
from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import not_needed
from cvmk.ops.attention_distill import Call, KlCall, Out, distill_op, kl_op, maps_alone
from cvmk.ops.triton import _launch
from cvmk.ops.triton._attention_blocks import DISTILL_FORWARD, DISTILL_KEYS, DISTILL_QUERIES, LOG_SUMS
from cvmk.ops.triton._attention_call import DTYPES, FAR, WIDEST, padded, rows_contiguous, strides

TUNED = (LOG_SUMS, DISTILL_FORWARD, DISTILL_QUERIES, DISTILL_KEYS)


@dataclass(frozen=True)
class Prepared:
    """A call's tensors, with contiguous rows, and what its kernels take in one order."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    teacher_q: Tensor
    teacher_k: Tensor
    key_lengths: Tensor | None
    right: int
    scale: float
    teacher_scale: float

    @property
    def teachers(self) -> int:
        """Teacher heads whose mean map a student head is compared with."""
        return self.teacher_q.shape[1] // math.gcd(self.q.shape[1], self.teacher_q.shape[1])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.teacher_q, self.teacher_k, self.key_lengths

    @property
    def strides(self) -> tuple[int, ...]:
        v = (0, 0, 0) if self.v is None else strides(self.v)
        return *strides(self.q), *strides(self.k), *v, *strides(self.teacher_q), *strides(self.teacher_k)

    @property
    def numbers(self) -> tuple[Any, ...]:
        """heads to t_factor."""
        heads, t_heads = self.q.shape[1], self.teacher_q.shape[1]
        together = heads // math.gcd(heads, t_heads)
        factors = self.scale * math.log2(math.e), self.teacher_scale * math.log2(math.e)
        group, t_group = heads // self.k.shape[1], t_heads // self.teacher_k.shape[1]
        return heads, group, t_heads, t_group, together, self.q.shape[2], self.k.shape[2], self.right, *factors

    @property
    def constants(self) -> dict[str, Any]:
        d, dt = self.q.shape[3], self.teacher_q.shape[3]
        dv = d if self.v is None else self.v.shape[3]
        return {
            "D": d, "DV": dv, "DT": dt, "D_PADDED": padded(d), "DV_PADDED": padded(dv), "DT_PADDED": padded(dt), "TEACHERS": self.teachers,
            "PRECISION": _launch.float32_precision(),
        }  # fmt: skip

    def key(self) -> str:
        """The key of the tuning table."""
        sizes = [self.q.shape[3], self.teacher_q.shape[3], 0 if self.v is None else self.v.shape[3]]
        dtype = torch.promote_types(self.q.dtype, self.teacher_q.dtype)
        return f"{str(dtype).removeprefix('torch.')} d{padded(max(sizes))} {'one' if self.teachers == 1 else 'several'}"


def _prepared(c: Call) -> Prepared:
    q, k, teacher_q, teacher_k = (rows_contiguous(x) for x in (c.q, c.k, c.teacher_q, c.teacher_k))
    v = None if c.v is None else rows_contiguous(c.v)
    lengths = None if c.key_lengths is None else c.key_lengths.contiguous()
    return Prepared(q, k, v, teacher_q, teacher_k, lengths, 0 if c.causal else FAR, c.scale, c.teacher_scale)


def distill_forward(c: Call) -> Out:
    """(out, kl, lse, teacher_lse) of `cvmk.ops.flash_attention_distill`, out None where v is."""
    call = _prepared(c)
    q, v = call.q, call.v
    batch, heads, rows, _ = q.shape
    kl, lse = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    teacher_lse = torch.empty(call.teacher_q.shape[:3], dtype=torch.float32, device=q.device)
    out = None if v is None else torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    kernels = _launch.kernels("distill_attention_forward")
    if call.teachers > 1:
        _log_sums(call, teacher_lse)
    config = DISTILL_FORWARD.config(call.key(), q.device)
    _launch.launch(
        kernels.forward, (batch * heads * -(-rows // config["BLOCK_M"]),), *call.tensors, out, kl, lse, teacher_lse, *call.strides, *call.numbers,
        **call.constants, **config,
    )  # fmt: skip
    return Out(out, kl, lse, teacher_lse)  # type: ignore[arg-type]


def _log_sums(call: Prepared, lse: Tensor) -> None:
    """The log-sum-exps of the teacher's scores."""
    q, k = call.teacher_q, call.teacher_k
    batch, heads, rows, d = q.shape
    config = LOG_SUMS.config(f"{str(q.dtype).removeprefix('torch.')} d{padded(d)}", q.device)
    _launch.launch(
        _launch.kernels("distill_attention_forward").log_sums, (batch * heads * -(-rows // config["BLOCK_M"]),), q, k, call.key_lengths, lse,
        *strides(q), *strides(k), heads, heads // k.shape[1], rows, k.shape[2], call.right, call.teacher_scale * math.log2(math.e),
        D=d, D_PADDED=padded(d), PRECISION=_launch.float32_precision(), **config,
    )  # fmt: skip


def distill_backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    call = _prepared(c)
    q, k, v = call.q, call.k, call.v
    out, grad_kl, grad_lse = (None if x is None else x.contiguous() for x in (saved.out, grads.kl, grads.lse))
    lse, teacher_lse = saved.lse.contiguous(), saved.teacher_lse.contiguous()
    grad = None if grads.out is None or v is None else rows_contiguous(grads.out)
    dq, dk, dv = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if t is not None and needed else None for t, needed in zip((q, k, v), needs, strict=True)
    )
    if dv is not None and grad is None:
        dv.zero_()
    if q.numel() == 0 or k.numel() == 0:
        return tuple(not_needed(q) if t is None else t.zero_() for t in (dq, dk, dv))  # type: ignore[return-value]
    kernels, device = _launch.kernels("distill_attention_backward"), q.device
    delta = torch.empty(q.shape[:3], dtype=torch.float32, device=device)
    gradients = (*call.strides, *((0, 0, 0) if grad is None else strides(grad)), *call.numbers, call.scale)
    if dq is not None or dk is not None:
        config = DISTILL_QUERIES.config(call.key(), device)
        _launch.launch(
            kernels.query_gradient, (q.shape[0] * q.shape[1] * -(-q.shape[2] // config["BLOCK_M"]),), *call.tensors, out, lse, teacher_lse, grad,
            grad_kl, grad_lse, delta, dq, *gradients, **call.constants, **config,
        )  # fmt: skip
    if dk is not None or (dv is not None and grad is not None):
        config = DISTILL_KEYS.config(call.key(), device)
        _launch.launch(
            kernels.key_gradient, (k.shape[0] * k.shape[1] * -(-k.shape[2] // config["BLOCK_N"]),), *call.tensors, lse, teacher_lse, grad, grad_kl,
            delta, dk, dv if grad is not None else None, *gradients, **call.constants, **config,
        )  # fmt: skip
    return tuple(not_needed(q) if t is None else t for t in (dq, dk, dv))  # type: ignore[return-value]


# -- what is taken ------------------------------------------------------------------------------------------------------------------------
def _reasons(teacher_q: Tensor, **wide: Tensor) -> list[str]:
    found = [] if teacher_q.dtype in DTYPES else [f"teacher_q is {teacher_q.dtype}, not one of {', '.join(str(d) for d in DTYPES)}"]
    named = {**wide, "teacher_q": teacher_q}
    return found + [f"{name} has head size {x.shape[-1]}, more than {WIDEST}" for name, x in named.items() if x.shape[-1] > WIDEST]


def _kl_limits(which: str, c: KlCall) -> list[str]:
    return _reasons(c.teacher_q, student_q=c.student_q)


def _limits(which: str, c: Call) -> list[str]:
    return _reasons(c.teacher_q, q=c.q, v=c.v)


def _backend(op: str, limits: Callable[..., list[str]], forward: Callable[..., Any], backward: Callable[..., Any]) -> Backend:
    return Backend(
        op, "triton", forward, backward, dtypes=DTYPES, devices=triton.DEVICES, limits=limits, unavailable=triton.reason, by_default=triton.by_default
    )


kl_forward, kl_backward = maps_alone(distill_forward, distill_backward)
BACKENDS = (
    _backend("attention_kl", _kl_limits, kl_forward, kl_backward),
    _backend("flash_attention_distill", _limits, distill_forward, distill_backward),
)


# -- what the compile gate and the tuner run -------------------------------------------------------------------------------------------
def _case(name: str, dtype: torch.dtype, student: tuple[int, int, int], teacher: tuple[int, int, int], size: int, values: bool = True) -> _launch.Case:
    """student, teacher: heads, heads of keys, head size."""

    def run(device: torch.device) -> None:
        (h, kv, d), (th, tkv, dt) = student, teacher
        q, k, v, tq, tk = (_launch.sample((4, n, size, width), dtype, device) for n, width in ((h, d), (kv, d), (kv, d), (th, dt), (tkv, dt)))
        lengths = torch.full((4,), size, dtype=torch.int32, device=device)
        rest = tq, tk, lengths, True, d**-0.5, dt**-0.5
        if values:
            call = Call(q, k, v, *rest)
            out = distill_forward(call)
            distill_backward(Out(out.out, out.kl, None, None), call, out, distill_op.needs(True, True, True))  # type: ignore[arg-type]
        else:
            maps = KlCall(q, k, *rest)
            found = kl_forward(maps)
            kl_backward(found._replace(lse=None, teacher_lse=None), maps, found, kl_op.needs(True, True))  # type: ignore[arg-type]

    return _launch.Case(name, run)


CASES = (
    _case("bf16 d64", torch.bfloat16, (8, 8, 64), (8, 8, 64), 1024),
    _case("bf16 d128", torch.bfloat16, (8, 8, 128), (8, 8, 128), 1024),
    _case("fp16 d32, mean of two d64", torch.float16, (8, 8, 32), (16, 16, 64), 512),
    _case("fp32 d64", torch.float32, (8, 4, 64), (8, 8, 64), 512),
    _case("bf16 d64, maps only", torch.bfloat16, (8, 8, 64), (8, 8, 64), 1024, values=False),
)
