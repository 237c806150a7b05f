"""`linear_kd_loss` on the CPU library: products of bfloat16 operands on AMX tiles, or on vector registers in pairs (AVX512_BF16), where the processor
has those, else in float32; losses and gradients are made while the logits are in the cache.

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
from cvmk.ops._call import Needs, make
from cvmk.ops._dtypes import not_needed
from cvmk.ops.kd_loss import kernel_options, matrix, vector
from cvmk.ops.linear_kd_loss import Call, Out, kept, loss_scale, needed_of
from cvmk.ops.native._memory import empty
from cvmk.ops.native.kd_loss import TYPES, loss_reasons, missing

_ONE = torch.ones((), dtype=torch.float32)
_NOTHING = (None,) * 4


def _layer(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    return matrix(hidden), matrix(weight), None if bias is None else vector(bias)


def _run(
    c: Call, grads: tuple[Tensor | None, ...], divisor: Tensor, wanted: list[bool], scalars: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Statistics and the gradients in float32 of those that are wanted; the loss, its parts and the normaliser go to `scalars`."""
    y = vector(c.target)
    stats = torch.empty((5, y.shape[0]), dtype=torch.float32)
    shapes = (c.student_hidden.shape, c.student_weight.shape, c.student_weight.shape[:1])
    found = tuple([empty(shape, torch.float32) if want else None for want, shape in zip(wanted, shapes, strict=True)])
    student, teacher = _layer(c.student_hidden, c.student_weight, c.student_bias), _layer(c.teacher_hidden, c.teacher_weight, c.teacher_bias)
    library = native.library()
    assert library is not None
    vocabulary = c.student_weight.shape[0]
    library.linear_kd_loss(c.lowered, vocabulary, *student, *teacher, y, *kernel_options(c), stats, c.normalizer, *grads, divisor, *scalars, *found)
    return stats, found


def _losses(c: Call) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor | None, ...]]:
    """(loss, kd, ce, count), the statistics, and the gradients of the loss times count of those that are wanted."""
    scalars = tuple(torch.empty((), dtype=torch.float32) for _ in range(4))
    stats, found = _run(c, (_ONE, None, None), _ONE, c.wanted, scalars)
    return scalars, stats, found


def forward(c: Call) -> Out:
    scalars, stats, found = _losses(c)
    return make(Out, (*scalars, stats, *[not_needed(stats) if x is None else x for x in found]))


def forward_with_gradient(c: Call) -> tuple[Out, Callable[[Tensor], tuple[Tensor | None, ...]]] | None:
    """The forward pass, whose gradients in float32 are those of float32 operands but for a factor: they are handed on without a copy."""
    if c.student_hidden.dtype != torch.float32:
        return None
    scalars, stats, found = _losses(c)
    nothing = not_needed(stats)

    def hand_on(g_loss: Tensor) -> tuple[Tensor | None, ...]:
        scale = g_loss / scalars[3]
        return tuple([None if x is None else x.mul_(scale) for x in found])

    return make(Out, (*scalars, stats, nothing, nothing, nothing)), hand_on


def _scaled(total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """total * scale in `dtype`, rounded once."""
    out = empty(total.shape, dtype)
    library = native.library()
    assert library is not None
    library.scaled(total.contiguous(), out, total.numel(), scale)
    return out


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    needed = needed_of(c, needs)
    sums: tuple[Tensor | None, ...] = saved[5:]
    scale = loss_scale(grads, saved)
    if scale is None:
        scale, sums = _ONE, _run(c, grads[:3], saved.divisor, needed, _NOTHING)[1]
    elif not kept(c, saved, needed):  # they were handed on: made again, to the same bits
        sums = _run(c, (_ONE, None, None), _ONE, needed, _NOTHING)[1]
    found = []
    for need, x, total in zip(needed, c[:3], sums, strict=True):
        found.append(_scaled(total, scale, x.dtype) if need and x is not None and total is not None else None)
    return tuple(found)


BACKENDS = (
    Backend(
        "linear_kd_loss",
        "native",
        forward,
        backward,
        forward_with_gradient,
        dtypes=TYPES,
        devices=("cpu",),
        limits=lambda which, c: loss_reasons(c, "teacher_weight"),
        unavailable=lambda: missing("linear_kd_loss", "scaled"),
    ),
)
