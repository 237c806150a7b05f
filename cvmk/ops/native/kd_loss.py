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
from cvmk.ops._call import Needs, make
from cvmk.ops.kd_loss import Call, Loss, Losses, Out, heat, kernel_options, matrix, vector
from cvmk.ops.native._memory import NUMBER, empty
from cvmk.ops.reference.kd_loss import scale

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of logits that the library reads."""
_NATIVE: Any = native.library()


def _losses(c: Call, gradient: Tensor | None) -> Out:
    """The forward pass; the gradient of the loss by itself goes to `gradient`, rows [..., V] at one distance, where it is given."""
    y = vector(c.target)
    loss, kd, ce, divisor = torch.empty_like(NUMBER), torch.empty_like(NUMBER), torch.empty_like(NUMBER), torch.empty_like(NUMBER)
    stats = NUMBER.new_empty(5, y.shape[0])
    _NATIVE.kd_loss(matrix(c.student), matrix(c.teacher), y, *kernel_options(c), stats, c.normalizer, loss, kd, ce, divisor, matrix(gradient))
    return make(Out, (loss, kd, ce, divisor, stats))


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


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> Tensor | None:
    if not needs.student:
        return None
    gradient = empty(c.student.shape, c.student.dtype)
    student, teacher, stats = matrix(c.student), matrix(c.teacher), saved.stats.contiguous()
    _NATIVE.kd_loss_gradient(student, teacher, vector(c.target), *kernel_options(c), stats, grads.loss, grads.kd, grads.ce, saved.divisor, gradient)
    return gradient


def missing(*names: str) -> str | None:
    """Why the library cannot run the loss whose entries are `names`; None where it can."""
    library = native.library()
    if library is None:
        return native.reason()
    lacking = [name for name in names if not hasattr(library, name)]
    return f"cvmk._native is an older build without {lacking[0]}: install the package again" if lacking else None


def loss_reasons(c: Loss, name: str) -> list[str]:
    """Why a loss of the library does not take a call, whose tensor `name` is the teacher's."""
    teacher = getattr(c, name)
    wrong = teacher is not None and teacher.dtype not in TYPES
    return heat(c) + ([f"{name} is {teacher.dtype}, not float32, bfloat16 or float16"] if wrong else [])


_COMMON: dict[str, Any] = {
    "dtypes": TYPES,
    "devices": ("cpu",),
    "limits": lambda which, c: loss_reasons(c, "teacher"),
    "unavailable": lambda: missing("kd_loss", "kd_loss_gradient", "Buffer"),
}
BACKENDS = (
    Backend("kd_loss", "native", forward, backward, forward_with_gradient, **_COMMON),
    Backend("kd_loss_in_place", "native", in_place, **_COMMON),
    Backend("kd_loss_scale", "native", scale, devices=("cpu",)),
)
