"""`kd_loss` by the CUDA kernels in csrc/distill/cuda_kd_*.cu: one block a row, each pass reads the logits once.

Where a target lies outside of the vocabulary (and is not `ignore_index`) the cross-entropy is NaN, for looking at it first would wait
for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import cuda
from cvmk.ops._dispatch import Backend, not_needed
from cvmk.ops.cuda import TYPES, address
from cvmk.ops.native.kd_loss import DIVERGENCES
from cvmk.ops.reference.kd_loss import multiply


def _rows(logits: Tensor | None) -> tuple[Tensor | None, int, int]:
    """[N, V] with a contiguous last dimension, its address and the stride of its rows; zeros for None."""
    if logits is None:
        return None, 0, 0
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.data_ptr(), rows.stride(0)


def _forward(
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
    z, *z_place = _rows(student)
    t, *t_place = _rows(teacher)
    y = target.reshape(-1).contiguous()
    rows = y.shape[0]
    float32: dict[str, Any] = {"dtype": torch.float32, "device": student.device}
    loss, kd, ce, count = (torch.empty((), **float32) for _ in range(4))
    stats, scratch = torch.empty((5, rows), **float32), torch.empty((2, rows), **float32)
    library = cuda.library()
    assert library is not None
    library.kd_loss(
        (
            *cuda.place(student),
            *(*z_place, *t_place, TYPES[student.dtype]),
            *(y.data_ptr(), y.dtype == torch.int64, rows, student.shape[-1], ignore_index),
            *(DIVERGENCES[divergence], stats.data_ptr(), address(normalizer)),
            *(scratch.data_ptr(), scratch[1:].data_ptr(), loss.data_ptr(), kd.data_ptr(), ce.data_ptr(), count.data_ptr()),
        ),
        *(temperature, alpha, mixture, label_smoothing),
    )
    return loss, kd, ce, count, stats


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
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    options = temperature, alpha, divergence, mixture, label_smoothing, ignore_index
    _write_gradient(gradient, (g_loss, g_kd, g_ce), student, teacher, target, count, stats.contiguous(), options)
    return gradient


def _write_gradient(
    gradient: Tensor,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    count: Tensor,
    stats: Tensor,
    options: tuple[Any, ...],
) -> None:
    """The gradient to a contiguous tensor, which may be the student's logits: every thread reads its entries before it writes them."""
    temperature, alpha, divergence, mixture, label_smoothing, ignore_index = options
    z, *z_place = _rows(student)
    t, *t_place = _rows(teacher)
    y = target.reshape(-1).contiguous()
    library = cuda.library()
    assert library is not None
    library.kd_loss_gradient(
        (
            *cuda.place(student),
            *(*z_place, *t_place, TYPES[student.dtype]),
            *(y.data_ptr(), y.dtype == torch.int64, y.shape[0], student.shape[-1], ignore_index),
            *(DIVERGENCES[divergence], stats.data_ptr(), count.data_ptr()),
            *(*map(address, upstream), gradient.data_ptr()),
        ),
        *(temperature, alpha, mixture, label_smoothing),
    )


def _in_place(student: Tensor, teacher: Tensor | None, target: Tensor, normalizer: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    loss, kd, ce, count, stats = _forward(student, teacher, target, normalizer, *options)
    _write_gradient(student, (torch.ones_like(loss), None, None), student, teacher, target, count, stats, options)
    return loss, kd, ce


def _limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    student, teacher = arguments["student"], arguments["teacher"]
    return [f"teacher is {teacher.dtype}, not {student.dtype} as the student"] if teacher is not None and teacher.dtype != student.dtype else []


def _limits_in_place(which: str, arguments: Mapping[str, Any]) -> list[str]:
    found = _limits(which, arguments) if which == "forward" else []
    return found if arguments["student"].is_contiguous() else [*found, "writes in place of contiguous logits only"]


_COMMON: dict[str, Any] = {
    "dtypes": tuple(TYPES),
    "devices": ("cuda",),
    "unavailable": cuda.reason,
    "by_default": cuda.by_default("kd_loss", "student"),
}
BACKENDS = (
    Backend("kd_loss", "cuda", _forward, _backward, limits=_limits, **_COMMON),
    Backend("kd_loss_in_place", "cuda", _in_place, multiply, limits=_limits_in_place, **_COMMON),
)
