"""`linear_kd_loss` on the CPU library: products in bfloat16 on AMX tiles where the level and the operands have those, else in float32 on
vector registers; losses and gradients are made while the logits are in the cache.

Logits exist a block at a time, or a chunk of rows, and are made for the sums and the gradients, which are those of the loss by itself,
before the normaliser: the backward pass multiplies them into fresh tensors. Where a part is differentiated too, it runs again.

Besides the gradients in float32 there is scratch of a bounded size, whatever the rows and the vocabulary: at widths of up to 512 less than
64 MiB on up to 6 threads, and at most 69 MiB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvmk.ops import native
from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import not_needed
from cvmk.ops.kd_loss import NUMBERS
from cvmk.ops.linear_kd_loss import Call, Out, kept, loss_scale, needed_of
from cvmk.ops.native._memory import empty
from cvmk.ops.native.kd_loss import TYPES, address, missing, teacher_reasons

Layer = tuple[int, int, int, int, int, int, int]
_LOWERED = 3
"""The type of float32 operands that are rounded to bfloat16 where they are read (csrc/distill/params.h)."""
_ONE = torch.ones((), dtype=torch.float32)


def _matrix(x: Tensor) -> Tensor:
    """[rows, width] with a contiguous last dimension."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _run(
    c: Call, grads: tuple[Tensor | None, ...], divisor: Tensor, wanted: list[bool], scalars: tuple[Tensor, ...] | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Statistics and the gradients in float32 of those that are wanted; the loss, its parts and the normaliser go to `scalars`."""
    alive: list[Tensor] = []

    def layer(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Layer:
        if hidden is None or weight is None:
            return 0, 0, 0, 0, 0, 0, 0
        rows, matrix = _matrix(hidden), _matrix(weight)
        bias = None if bias is None else bias.contiguous()
        alive.extend(x for x in (rows, matrix, bias) if x is not None)
        return rows.data_ptr(), matrix.data_ptr(), address(bias), rows.shape[1], rows.stride(0), matrix.stride(0), _LOWERED if c.lowered else TYPES[rows.dtype]

    y = c.target.reshape(-1).contiguous()
    stats = torch.empty((5, y.shape[0]), dtype=torch.float32)
    shapes = (c.student_hidden.shape, c.student_weight.shape, c.student_weight.shape[:1])
    found = tuple(empty(shape, torch.float32) if want else None for want, shape in zip(wanted, shapes, strict=True))
    library = native.library()
    assert library is not None
    library.linear_kd_loss(
        layer(c.student_hidden, c.student_weight, c.student_bias),
        layer(c.teacher_hidden, c.teacher_weight, c.teacher_bias),
        y.data_ptr(),
        y.dtype == torch.int64,
        y.shape[0],
        c.student_weight.shape[0],
        c.ignore_index,
        c.temperature,
        c.alpha,
        NUMBERS[c.divergence],
        c.mixture,
        c.label_smoothing,
        address(c.normalizer),
        *(address(g) for g in grads),
        divisor.data_ptr(),
        stats.data_ptr(),
        *((0, 0, 0, 0) if scalars is None else (x.data_ptr() for x in scalars)),
        *(address(x) for x in found),
    )
    return stats, found


def _losses(c: Call) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor | None, ...]]:
    """(loss, kd, ce, count), the statistics, and the gradients of the loss times count of those that are wanted."""
    scalars = tuple(torch.empty((), dtype=torch.float32) for _ in range(4))
    stats, found = _run(c, (_ONE, None, None), _ONE, c.wanted, scalars)
    return scalars, stats, found


def forward(c: Call) -> Out:
    scalars, stats, found = _losses(c)
    return Out(*scalars, stats, *(not_needed(stats) if x is None else x for x in found))  # type: ignore[call-arg]


def forward_with_gradient(c: Call) -> tuple[Out, Callable[[Tensor], tuple[Tensor, ...]]] | None:
    """The forward pass, whose gradients in float32 are those of float32 operands but for a factor: they are handed on without a copy."""
    if c.student_hidden.dtype != torch.float32:
        return None
    scalars, stats, found = _losses(c)
    nothing = not_needed(stats)

    def hand_on(g_loss: Tensor) -> tuple[Tensor, ...]:
        scale = g_loss / scalars[3]
        return tuple([nothing if x is None else x.mul_(scale) for x in found])

    return Out(*scalars, stats, nothing, nothing, nothing), hand_on  # type: ignore[call-arg]


def _scaled(total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """total * scale in `dtype`, rounded once."""
    out = empty(total.shape, dtype)
    library = native.library()
    assert library is not None
    total = total.contiguous()
    library.scaled(total.data_ptr(), total.numel(), scale.data_ptr(), out.data_ptr(), TYPES[dtype])
    return out


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor, ...]:
    needed, nothing = needed_of(c, needs), not_needed(c.student_hidden)
    sums: tuple[Tensor | None, ...] = saved[5:]
    scale = loss_scale(grads, saved)
    if scale is None:
        scale, sums = _ONE, _run(c, grads[:3], saved.divisor, needed, None)[1]
    elif not kept(c, saved, needed):  # they were handed on: made again, to the same bits
        sums = _run(c, (_ONE, None, None), _ONE, needed, None)[1]
    found = []
    for need, x, total in zip(needed, c[:3], sums, strict=True):
        found.append(_scaled(total, scale, x.dtype) if need and x is not None and total is not None else nothing)
    return tuple(found)


BACKENDS = (
    Backend(
        "linear_kd_loss",
        "native",
        forward,
        backward,
        forward_with_gradient,
        dtypes=tuple(TYPES),
        devices=("cpu",),
        limits=lambda which, c: teacher_reasons("teacher_weight", c.teacher_weight),
        unavailable=lambda: missing("linear_kd_loss", "scaled"),
    ),
)
