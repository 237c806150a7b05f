"""`attention_kl` and `flash_attention_distill` in Triton: float32, bfloat16 and float16 on either side, sums in float32, head sizes up to 256.

Where a student head is compared with one teacher head, one launch does it all; with a mean of several maps, the teacher's log-sum-exps come
first. Backward: the gradient of the queries, then that of keys and values, each with the teacher's map computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import triton
from cvmk.ops._dispatch import Backend, not_needed
from cvmk.ops.triton import _launch
from cvmk.ops.triton._attention_blocks import DISTILL_FORWARD, DISTILL_KEYS, DISTILL_QUERIES, LOG_SUMS
from cvmk.ops.triton._attention_call import DTYPES, FAR, WIDEST, padded, rows_contiguous, strides

TUNED = (LOG_SUMS, DISTILL_FORWARD, DISTILL_QUERIES, DISTILL_KEYS)


@dataclass(frozen=True)
class Call:
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


def _call(
    q: Tensor, k: Tensor, v: Tensor | None, teacher_q: Tensor, teacher_k: Tensor, key_lengths: Tensor | None, causal: bool, scale: float, teacher_scale: float
) -> Call:
    q, k, teacher_q, teacher_k = (rows_contiguous(x) for x in (q, k, teacher_q, teacher_k))
    v = None if v is None else rows_contiguous(v)
    lengths = None if key_lengths is None else key_lengths.contiguous()
    return Call(q, k, v, teacher_q, teacher_k, lengths, 0 if causal else FAR, scale, teacher_scale)


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
    """(out, kl, lse, teacher_lse) of `cvmk.ops.flash_attention_distill`, without out where v is None."""
    call = _call(q, k, v, teacher_q, teacher_k, key_lengths, causal, scale, teacher_scale)
    q = call.q
    batch, heads, rows, _ = q.shape
    kl, lse = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    teacher_lse = torch.empty(teacher_q.shape[:3], dtype=torch.float32, device=q.device)
    out = None if v is None else torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    kernels = _launch.kernels("distill_attention_forward")
    if call.teachers > 1:
        _log_sums(call, teacher_lse)
    config = DISTILL_FORWARD.config(call.key(), q.device)
    _launch.launch(
        kernels.forward, (batch * heads * -(-rows // config["BLOCK_M"]),), *call.tensors, out, kl, lse, teacher_lse, *call.strides, *call.numbers,
        **call.constants, **config,
    )  # fmt: skip
    return (kl, lse, teacher_lse) if out is None else (out, kl, lse, teacher_lse)


def _log_sums(call: Call, lse: Tensor) -> None:
    """The log-sum-exps of the teacher's scores."""
    q, k = call.teacher_q, call.teacher_k
    batch, heads, rows, d = q.shape
    config = LOG_SUMS.config(f"{str(q.dtype).removeprefix('torch.')} d{padded(d)}", q.device)
    _launch.launch(
        _launch.kernels("distill_attention_forward").log_sums, (batch * heads * -(-rows // config["BLOCK_M"]),), q, k, call.key_lengths, lse,
        *strides(q), *strides(k), heads, heads // k.shape[1], rows, k.shape[2], call.right, call.teacher_scale * math.log2(math.e),
        D=d, D_PADDED=padded(d), PRECISION=_launch.float32_precision(), **config,
    )  # fmt: skip


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
    call = _call(q, k, v, teacher_q, teacher_k, key_lengths, causal, scale, teacher_scale)
    out, grad_kl, grad_lse = (None if x is None else x.contiguous() for x in (out, grad_kl, grad_lse))
    lse, teacher_lse = lse.contiguous(), teacher_lse.contiguous()
    grad = None if grad_out is None or v is None else rows_contiguous(grad_out)
    dq, dk, dv = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if t is not None and needed else None
        for t, needed in zip((q, k, v), (*needs[:2], v is not None and needs[2]), strict=True)
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
    return distill_forward(student_q, student_k, None, teacher_q, teacher_k, key_lengths, causal, scale, teacher_scale)


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


# -- what is taken ------------------------------------------------------------------------------------------------------------------------
def _limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    teacher: Tensor = arguments["teacher_q"]
    found = [] if teacher.dtype in DTYPES else [f"teacher_q is {teacher.dtype}, not one of {', '.join(str(d) for d in DTYPES)}"]
    wide = [name for name in ("q", "student_q", "v", "teacher_q") if name in arguments and arguments[name].shape[-1] > WIDEST]
    return found + [f"{name} has head size {arguments[name].shape[-1]}, more than {WIDEST}" for name in wide]


def _backend(op: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Backend:
    return Backend(
        op, "triton", forward, backward, dtypes=DTYPES, devices=triton.DEVICES, limits=_limits, unavailable=triton.reason, by_default=triton.by_default
    )


BACKENDS = (_backend("attention_kl", kl_forward, kl_backward), _backend("flash_attention_distill", distill_forward, distill_backward))


# -- what the compile gate and the tuner run -------------------------------------------------------------------------------------------
def _case(name: str, dtype: torch.dtype, student: tuple[int, int, int], teacher: tuple[int, int, int], size: int, values: bool = True) -> _launch.Case:
    """student, teacher: heads, heads of keys, head size."""

    def run(device: torch.device) -> None:
        (h, kv, d), (th, tkv, dt) = student, teacher
        q, k, v, tq, tk = (_launch.sample((4, n, size, width), dtype, device) for n, width in ((h, d), (kv, d), (kv, d), (th, dt), (tkv, dt)))
        lengths = torch.full((4,), size, dtype=torch.int32, device=device)
        rest = True, d**-0.5, dt**-0.5
        if values:
            out, kl, lse, teacher_lse = distill_forward(q, k, v, tq, tk, lengths, *rest)
            distill_backward(out, kl, None, None, q, k, v, tq, tk, lengths, out, lse, teacher_lse, *rest, [True, True, True])
        else:
            kl, lse, teacher_lse = kl_forward(q, k, tq, tk, lengths, *rest)
            kl_backward(kl, None, None, q, k, tq, tk, lengths, lse, teacher_lse, *rest, [True, True])

    return _launch.Case(name, run)


CASES = (
    _case("bf16 d64", torch.bfloat16, (8, 8, 64), (8, 8, 64), 1024),
    _case("bf16 d128", torch.bfloat16, (8, 8, 128), (8, 8, 128), 1024),
    _case("fp16 d32, mean of two d64", torch.float16, (8, 8, 32), (16, 16, 64), 512),
    _case("fp32 d64", torch.float32, (8, 4, 64), (8, 8, 64), 512),
    _case("bf16 d64, maps only", torch.bfloat16, (8, 8, 64), (8, 8, 64), 1024, values=False),
)
