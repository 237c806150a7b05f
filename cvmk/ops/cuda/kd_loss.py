"""`kd_loss` by the CUDA kernels in csrc/distill/cuda_kd_*.cu: one block a row, each pass reads the logits once.

Where a target lies outside of the vocabulary (and is not `ignore_index`) the cross-entropy is NaN, for looking at it first would wait
for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops import cuda
from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops.cuda import TYPES
from cvmk.ops.kd_loss import Call, Losses, Out, heat, kernel_options, matrix, vector
from cvmk.ops.reference.kd_loss import scale


def _rows(c: Call) -> tuple[object, ...]:
    """The arguments that both passes have in common, but for the statistics."""
    return cuda.stream(c.student), matrix(c.student), matrix(c.teacher), vector(c.target), *kernel_options(c)


def _forward(c: Call) -> Out:
    rows = c.target.numel()
    float32: dict[str, Any] = {"dtype": torch.float32, "device": c.student.device}
    loss, kd, ce, divisor = (torch.empty((), **float32) for _ in range(4))
    stats, scratch = torch.empty((5, rows), **float32), torch.empty((2, rows), **float32)
    library = cuda.library()
    assert library is not None
    library.kd_loss(*_rows(c), stats, c.normalizer, *scratch.unbind(0), loss, kd, ce, divisor)
    return Out(loss, kd, ce, divisor, stats)


def _backward(grads: Out, c: Call, saved: Out, needs: Needs) -> Tensor | None:
    if not needs.student:
        return None
    gradient = torch.empty(c.student.shape, dtype=c.student.dtype, device=c.student.device)
    _write_gradient(gradient, grads[:3], c, saved.divisor, saved.stats.contiguous())
    return gradient


def _write_gradient(gradient: Tensor, upstream: tuple[Tensor | None, ...], c: Call, count: Tensor, stats: Tensor) -> None:
    """The gradient to a contiguous tensor, which may be the student's logits: every thread reads its entries before it writes them."""
    library = cuda.library()
    assert library is not None
    library.kd_loss_gradient(*_rows(c), stats, count, *upstream, gradient)


def _in_place(c: Call) -> Losses:
    out = _forward(c)
    _write_gradient(c.student, (torch.ones_like(out.loss), None, None), c, out.divisor, out.stats)
    return Losses(*out[:3])


def _limits(which: str, c: Call) -> list[str]:
    found = heat(c)
    if c.teacher is not None and c.teacher.dtype != c.student.dtype:
        found.append(f"teacher is {c.teacher.dtype}, not {c.student.dtype} as the student")
    return found


def _limits_in_place(which: str, c: Call) -> list[str]:
    found = _limits(which, c)
    return found if c.student.is_contiguous() else [*found, "writes in place of contiguous logits only"]


_COMMON: dict[str, Any] = {
    "dtypes": TYPES,
    "devices": ("cuda",),
    "unavailable": cuda.reason,
    "by_default": cuda.by_default("kd_loss", "student"),
}
BACKENDS = (
    Backend("kd_loss", "cuda", _forward, _backward, limits=_limits, **_COMMON),
    Backend("kd_loss_in_place", "cuda", _in_place, limits=_limits_in_place, **_COMMON),
    Backend("kd_loss_scale", "cuda", scale, devices=("cuda",), unavailable=cuda.reason),
)
