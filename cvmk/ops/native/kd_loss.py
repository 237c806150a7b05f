"""`kd_loss` on the CPU library: a row of logits is read from memory once a pass, and nothing of its size is made but the gradient.

The forward pass saves five statistics a row and reads both logits; the backward pass reads both again and writes the gradient.
`with_gradient` does both while a row is in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import native
from cvmk.ops._dispatch import Backend, not_needed
from cvmk.ops.native._memory import empty
from cvmk.ops.reference.kd_loss import multiply

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of logits, as `csrc/distill/params.h` numbers them."""
DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "js": 2, "skew_kl": 3, "skew_reverse_kl": 4}


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


def _losses(
    gradient: Tensor | None,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    normalizer: Tensor | None,
    temperature: float,
    alpha: float,
    divergence: str,
    mixture: float,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """What the forward pass returns; the gradient of the loss by itself goes to `gradient`, rows [..., V] at one distance, where it is given."""
    z, *z_place = _rows(student)
    t, *t_place = _rows(teacher)
    y = _flat(target)
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
        student.shape[-1],
        ignore_index,
        temperature,
        alpha,
        DIVERGENCES[divergence],
        mixture,
        label_smoothing,
        address(normalizer),
        stats.data_ptr(),
        loss.data_ptr(),
        kd.data_ptr(),
        ce.data_ptr(),
        count.data_ptr(),
        gradient_address,
        gradient_stride,
    )
    return loss, kd, ce, count, stats


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    return _losses(None, *arguments)


def with_gradient(*arguments: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """The forward pass, and the gradient of the loss by itself: made while a row is in the cache, it saves reading both logits again."""
    student = arguments[0]
    gradient = empty(student.shape, student.dtype)
    return _losses(gradient, *arguments), gradient


def _in_place(*arguments: Any) -> tuple[Tensor, ...]:
    return _losses(arguments[0], *arguments)[:3]


def _backward(
    g_loss: Tensor | None,
    g_kd: Tensor | None,
    g_ce: Tensor | None,
    g_count: Tensor | None,
    g_stats: Tensor | None,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    normalizer: Tensor | None,
    count: Tensor,
    stats: Tensor,
    temperature: float,
    alpha: float,
    divergence: str,
    mixture: float,
    label_smoothing: float,
    ignore_index: int,
    needs: list[bool],
) -> Tensor:
    if not needs[0]:
        return not_needed(student)
    z, *z_place = _rows(student)
    t, *t_place = _rows(teacher)
    y = _flat(target)
    stats = stats.contiguous()
    gradient = empty(student.shape, student.dtype)
    library = native.library()
    assert library is not None
    library.kd_loss_gradient(
        *z_place,
        *t_place,
        y.data_ptr(),
        y.dtype == torch.int64,
        y.shape[0],
        student.shape[-1],
        ignore_index,
        temperature,
        alpha,
        DIVERGENCES[divergence],
        mixture,
        label_smoothing,
        stats.data_ptr(),
        count.data_ptr(),
        address(g_loss),
        address(g_kd),
        address(g_ce),
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


def _limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    teacher = arguments.get("teacher")
    return [f"teacher is {teacher.dtype}, not float32, bfloat16 or float16"] if teacher is not None and teacher.dtype not in TYPES else []


_COMMON: dict[str, Any] = {
    "dtypes": tuple(TYPES),
    "devices": ("cpu",),
    "limits": _limits,
    "unavailable": lambda: missing("kd_loss", "kd_loss_gradient", "Buffer"),
}
BACKENDS = (Backend("kd_loss", "native", _forward, _backward, **_COMMON), Backend("kd_loss_in_place", "native", _in_place, multiply, **_COMMON))
