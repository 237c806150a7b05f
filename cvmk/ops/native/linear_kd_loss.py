"""`linear_kd_loss` on the CPU library: products in bfloat16 on AMX tiles where the level and the operands have those, else in float32 on
vector registers; losses and gradients are made while the logits are in the cache.

Logits exist a block at a time, or a chunk of rows, and are made for the sums and the gradients, which are those of the loss by itself,
before the normaliser: the backward pass multiplies them into fresh tensors. Where a part is differentiated too, it runs again.

Besides the gradients in float32 there is scratch of a bounded size, whatever the rows and the vocabulary: at widths of up to 512 less than
64 MiB on up to 6 threads, and at most 69 MiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import native
from cvmk.ops._dispatch import Backend, not_needed
from cvmk.ops.native._memory import empty
from cvmk.ops.native.kd_loss import DIVERGENCES, TYPES, address, missing

Layer = tuple[int, int, int, int, int, int, int]
_LOWERED = 3
"""The type of float32 operands that are rounded to bfloat16 where they are read (csrc/distill/params.h)."""
_ONE = torch.ones((), dtype=torch.float32)


def _matrix(x: Tensor) -> Tensor:
    """[rows, width] with a contiguous last dimension."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _run(
    tensors: tuple[Tensor | None, ...],
    target: Tensor,
    normalizer: Tensor | None,
    options: tuple[Any, ...],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    divisor: Tensor,
    wanted: list[bool],
    scalars: tuple[Tensor, ...] | None,
    lowered: bool = False,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Statistics and the gradients in float32 of those that are wanted; the loss, its parts and the normaliser go to `scalars`.

    `lowered`: the operands are float32 and are rounded to bfloat16 first.
    """
    temperature, alpha, divergence, mixture, label_smoothing, ignore_index = options
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias = tensors
    assert student_hidden is not None and student_weight is not None
    kept: list[Tensor] = []

    def layer(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Layer:
        if hidden is None or weight is None:
            return 0, 0, 0, 0, 0, 0, 0
        rows, matrix = _matrix(hidden), _matrix(weight)
        bias = None if bias is None else bias.contiguous()
        kept.extend(x for x in (rows, matrix, bias) if x is not None)
        return rows.data_ptr(), matrix.data_ptr(), address(bias), rows.shape[1], rows.stride(0), matrix.stride(0), _LOWERED if lowered else TYPES[rows.dtype]

    y = target.reshape(-1).contiguous()
    stats = torch.empty((5, y.shape[0]), dtype=torch.float32)
    shapes = (student_hidden.shape, student_weight.shape, student_weight.shape[:1])
    found = tuple(empty(shape, torch.float32) if want else None for want, shape in zip(wanted, shapes, strict=True))
    library = native.library()
    assert library is not None
    library.linear_kd_loss(
        layer(student_hidden, student_weight, student_bias),
        layer(teacher_hidden, teacher_weight, teacher_bias),
        y.data_ptr(),
        y.dtype == torch.int64,
        y.shape[0],
        student_weight.shape[0],
        ignore_index,
        temperature,
        alpha,
        DIVERGENCES[divergence],
        mixture,
        label_smoothing,
        address(normalizer),
        *(address(g) for g in grads),
        divisor.data_ptr(),
        stats.data_ptr(),
        *((0, 0, 0, 0) if scalars is None else (x.data_ptr() for x in scalars)),
        *(address(x) for x in found),
    )
    return stats, found


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, target, normalizer, options, wanted = arguments[:6], arguments[6], arguments[7], arguments[8:14], arguments[14]
    loss, kd, ce, count = (torch.empty((), dtype=torch.float32) for _ in range(4))
    stats, found = _run(tensors, target, normalizer, options, (_ONE, None, None), _ONE, wanted, (loss, kd, ce, count))
    return loss, kd, ce, count, stats, *(not_needed(stats) if x is None else x for x in found)


def lowered_forward(*arguments: Any) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """(loss, count, gradients of the student's operands by the loss times count) of float32 operands that are rounded to bfloat16 on their way
    into the products; the gradients keep float32, where they are wanted."""
    tensors, target, normalizer, options, wanted = arguments[:6], arguments[6], arguments[7], arguments[8:14], arguments[14]
    loss, kd, ce, count = (torch.empty((), dtype=torch.float32) for _ in range(4))
    _, found = _run(tensors, target, normalizer, options, (_ONE, None, None), _ONE, wanted, (loss, kd, ce, count), lowered=True)
    return loss, count, found


def _scaled(total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """total * scale in `dtype`, rounded once."""
    out = empty(total.shape, dtype)
    library = native.library()
    assert library is not None
    total = total.contiguous()
    library.scaled(total.data_ptr(), total.numel(), scale.data_ptr(), out.data_ptr(), TYPES[dtype])
    return out


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    g_loss, g_kd, g_ce = arguments[:3]
    tensors, target, normalizer, count = arguments[8:14], arguments[14], arguments[15], arguments[16]
    sums, options, wanted, needs = arguments[18:21], arguments[21:27], arguments[27], arguments[28]
    needed = [need and x is not None for need, x in zip(needs, tensors[:3], strict=False)]
    if g_kd is None and g_ce is None and g_loss is not None and all(have or not need for have, need in zip(wanted, needed, strict=True)):
        scale = g_loss / count
    else:
        scale = _ONE
        sums = _run(tensors, target, normalizer, options, (g_loss, g_kd, g_ce), count, needed, None)[1]
    return tuple(_scaled(total, scale, x.dtype) if need else not_needed(tensors[0]) for need, x, total in zip(needed, tensors, sums, strict=False))


def _limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    teacher = arguments["teacher_weight"]
    return [f"teacher_weight is {teacher.dtype}, not float32, bfloat16 or float16"] if teacher is not None and teacher.dtype not in TYPES else []


BACKENDS = (
    Backend(
        "linear_kd_loss",
        "native",
        _forward,
        _backward,
        dtypes=tuple(TYPES),
        devices=("cpu",),
        limits=_limits,
        unavailable=lambda: missing("linear_kd_loss", "scaled"),
    ),
)
