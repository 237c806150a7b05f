"""`kd_loss` on the CPU library: a row of logits is read from memory once a pass, and nothing of its size is made but the gradient.

The forward pass saves five statistics a row and reads both logits; the backward pass reads both again and writes the gradient. Writing
it in the forward pass already would not save traffic: the incoming gradient must be multiplied into a fresh tensor afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import native
from cvmk.ops._dispatch import Backend, not_needed

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of logits, as `csrc/distill/params.h` numbers them."""
DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "js": 2, "skew_kl": 3, "skew_reverse_kl": 4}


def _rows(logits: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """[N, V] with a contiguous last dimension, its address, the stride of its rows and the type; zeros for None."""
    if logits is None:
        return None, 0, 0, 0
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.data_ptr(), rows.stride(0), TYPES[rows.dtype]


def address(x: Tensor | None) -> int:
    """Where the tensor is; 0 for None."""
    return 0 if x is None else x.data_ptr()


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
    loss, kd, ce, count = (torch.empty((), dtype=torch.float32) for _ in range(4))
    stats = torch.empty((5, y.shape[0]), dtype=torch.float32)
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
    z, *z_place = _rows(student)
    t, *t_place = _rows(teacher)
    y = target.reshape(-1).contiguous()
    stats = stats.contiguous()
    gradient = torch.empty(student.shape, dtype=student.dtype)
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
    teacher = arguments["teacher"]
    return [f"teacher is {teacher.dtype}, not float32, bfloat16 or float16"] if teacher is not None and teacher.dtype not in TYPES else []


BACKENDS = (
    Backend(
        "kd_loss",
        "native",
        _forward,
        _backward,
        dtypes=tuple(TYPES),
        devices=("cpu",),
        limits=_limits,
        unavailable=lambda: missing("kd_loss", "kd_loss_gradient"),
    ),
)
