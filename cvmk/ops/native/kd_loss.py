"""`kd_loss` on the CPU library: a row of logits is read from memory once a pass, and nothing of its size is made but the gradient.

The forward pass saves five statistics a row and reads both logits; the backward pass reads both again and writes the gradient.
`forward_with_gradient` does both while a row is in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import native
from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import not_needed
from cvmk.ops.kd_loss import NUMBERS, Call, Losses, Out
from cvmk.ops.native._memory import empty
from cvmk.ops.reference.kd_loss import scale

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of logits, as `csrc/distill/params.h` numbers them."""
_NUMBER = torch.empty((), dtype=torch.float32)  # what results of one number are made like: half the time of torch.empty with a shape
_NOTHING = (None, 0, 0, 0)


def _rows(logits: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """[N, V] with a contiguous last dimension, its address, the stride of its rows and the type; zeros for None."""
    if logits is None:
        return _NOTHING
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.data_ptr(), rows.stride(0), TYPES[rows.dtype]


def _flat(target: Tensor) -> Tensor:
    """[N], contiguous."""
    return target if target.dim() == 1 and target.is_contiguous() else target.reshape(-1).contiguous()


def address(x: Tensor | None) -> int:
    """Where the tensor is; 0 for None."""
    return 0 if x is None else x.data_ptr()


def _losses(c: Call, gradient: Tensor | None) -> Out:
    """The forward pass; the gradient of the loss by itself goes to `gradient`, rows [..., V] at one distance, where it is given."""
    z, *z_place = _rows(c.student)
    t, *t_place = _rows(c.teacher)
    y = _flat(c.target)
    loss, kd, ce, count = torch.empty_like(_NUMBER), torch.empty_like(_NUMBER), torch.empty_like(_NUMBER), torch.empty_like(_NUMBER)
    stats = torch.empty((5, y.shape[0]), dtype=torch.float32)
    _, gradient_address, gradient_stride, _ = _NOTHING if gradient is None else _rows(gradient)
    library = native.library()
    assert library is not None
    library.kd_loss(
        *z_place,
        *t_place,
        y.data_ptr(),
        y.dtype == torch.int64,
        y.shape[0],
        c.student.shape[-1],
        c.ignore_index,
        c.temperature,
        c.alpha,
        NUMBERS[c.divergence],
        c.mixture,
        c.label_smoothing,
        address(c.normalizer),
        stats.data_ptr(),
        loss.data_ptr(),
        kd.data_ptr(),
        ce.data_ptr(),
        count.data_ptr(),
        gradient_address,
        gradient_stride,
    )
    return Out(loss, kd, ce, count, stats)


def forward(c: Call) -> Out:
    return _losses(c, None)


def forward_with_gradient(c: Call) -> tuple[Out, Callable[[Tensor], Tensor | None]] | None:
    """The forward pass, and the gradient of the loss by itself: made while a row is in the cache, it saves reading both logits again.

    Not in float16, whose gradient would underflow before a loss scale reaches it.
    """
    if c.student.dtype == torch.float16:
        return None
    gradient = empty(c.student.shape, c.student.dtype)

    def hand_on(g_loss: Tensor) -> Tensor | None:
        value = g_loss.item()
        if not math.isfinite(value):
            return None
        return gradient if value == 1 else gradient.mul_(g_loss)

    return _losses(c, gradient), hand_on


def in_place(c: Call) -> Losses:
    return Losses(*_losses(c, c.student)[:3])


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> Tensor:
    if not needs.student:
        return not_needed(c.student)
    z, *z_place = _rows(c.student)
    t, *t_place = _rows(c.teacher)
    y = _flat(c.target)
    stats = saved.stats.contiguous()
    gradient = empty(c.student.shape, c.student.dtype)
    library = native.library()
    assert library is not None
    library.kd_loss_gradient(
        *z_place,
        *t_place,
        y.data_ptr(),
        y.dtype == torch.int64,
        y.shape[0],
        c.student.shape[-1],
        c.ignore_index,
        c.temperature,
        c.alpha,
        NUMBERS[c.divergence],
        c.mixture,
        c.label_smoothing,
        stats.data_ptr(),
        saved.divisor.data_ptr(),
        address(grads.loss),
        address(grads.kd),
        address(grads.ce),
        gradient.data_ptr(),
    )
    return gradient


def missing(*names: str) -> str | None:
    """Why the library cannot run the loss whose entries are `names`; None where it can."""
    library = native.library()
    if library is None:
        return native.reason()
    lacking = [name for name in names if not hasattr(library, name)]
    return f"cvmk._native is an older build without {lacking[0]}: install the package again" if lacking else None


def teacher_reasons(name: str, teacher: Tensor | None) -> list[str]:
    """Why a loss of the library does not take this tensor of the teacher."""
    return [f"{name} is {teacher.dtype}, not float32, bfloat16 or float16"] if teacher is not None and teacher.dtype not in TYPES else []


_COMMON: dict[str, Any] = {
    "dtypes": tuple(TYPES),
    "devices": ("cpu",),
    "limits": lambda which, c: teacher_reasons("teacher", c.teacher),
    "unavailable": lambda: missing("kd_loss", "kd_loss_gradient", "Buffer"),
}
BACKENDS = (
    Backend("kd_loss", "native", forward, backward, forward_with_gradient, **_COMMON),
    Backend("kd_loss_in_place", "native", in_place, **_COMMON),
    Backend("kd_loss_scale", "native", scale, devices=("cpu",)),
)
