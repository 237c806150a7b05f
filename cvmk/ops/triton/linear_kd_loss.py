"""`linear_kd_loss` on GPUs: the products by cuBLAS for a chunk of rows, and one Triton launch between them for losses and gradients.

A chunk of n rows: student and teacher logits [n, V] in float32 (never rounded), then `kd_rows` reads both, writes their statistics and
the gradient [n, V] in the operands' dtype, and two products add it to the gradients of hidden states and weight in float32. The
gradients are those of the loss by itself, before the normaliser; the backward pass multiplies them into fresh tensors of the operands'
dtype. Where a part is differentiated too, the chunks are made again.

Why whole rows and not blocks of the vocabulary whose logits stay on the chip. Operations of student and teacher of width d: 8 N V d here;
12 N V d where logits are made once for the statistics and again for the gradient, since a gradient needs its whole row's sums first. Bytes a
logit here: 8 written, 8 read for the statistics, at most 8 for the gradient (`kd_rows` finds a part in the L2 cache), 2 written and
4 read for the products: 22 to 30, of which a Triton product with the sums in its epilogue would save 8. At 4.3 TB/s and 790 TFLOP/s
that traffic costs as much as products of width 512, an eighth of those of width 4096, while the second product costs half of them at
every width. So the widths from 1024 on keep more than 55 % of the products' rate, and at 512 it is about 45 %.

A chunk has n = max(2^26 / V, 2048) rows: fewer would read and write the float32 gradient of the weight, 8 V d bytes a chunk, too often.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import triton
from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import not_needed
from cvmk.ops.kd_loss import matrix, vector
from cvmk.ops.linear_kd_loss import Call, Out, kept, loss_scale, lowered, needed_of
from cvmk.ops.triton._launch import Case, sample
from cvmk.ops.triton.kd_loss import DTYPES, ROWS, Upstream, launch_rows, launch_total, loss_reasons

CHUNK, CHUNK_ROWS = 2**26, 2048
"""A chunk has CHUNK logits, or CHUNK_ROWS rows where those are more."""
BORDER = 64
"""Rows of the chunk's buffers have a multiple of so many entries, those behind the vocabulary -inf: all are read and multiplied in whole vectors."""


# -- products that are summed and returned in float32 ---------------------------------------------------------------------------
def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # where kernels are interpreted
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda and _adds_in_float32(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        product = torch.empty_like(out)
        _product(a, b, product)
        out.add_(product)


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this version of PyTorch adds a product of half precision to float32 in place: some take no float32 there. Asked once."""
    a, total = torch.ones(64, 64, dtype=dtype, device=device), torch.ones(64, 64, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return bool((total == 65).all())


# -- chunks ---------------------------------------------------------------------------------------------------------------------
def _padded(x: Tensor, width: int) -> Tensor:
    return x.contiguous() if x.shape[0] == width else torch.nn.functional.pad(x, (0, width - x.shape[0]))


def _run(
    c: Call, wanted: list[bool], upstream: Upstream | None = None, count: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Statistics [5, N] and losses [2, N] of the rows, and the gradients in float32 of those that are wanted."""
    c, y = lowered(c), vector(c.target)
    hidden, weight = matrix(c.student_hidden), matrix(c.student_weight)
    other = None if c.teacher_hidden is None or c.teacher_weight is None else (matrix(c.teacher_hidden), matrix(c.teacher_weight))
    (rows, width), vocabulary, device = hidden.shape, weight.shape[0], hidden.device
    wide = -(-vocabulary // BORDER) * BORDER
    biases = [None if bias is None else _padded(bias, wide) for bias in (c.student_bias, c.teacher_bias)]

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    stats, losses = new(5, rows), new(2, rows)
    found = [new(*shape) if want else None for want, shape in zip(wanted, ((rows, width), (vocabulary, width), (vocabulary,)), strict=True)]
    d_hidden, d_weight, d_bias = found
    if rows == 0:
        return stats, losses, [None if x is None else x.zero_() for x in found]
    # Rows that count nothing may hold NaN, and 0 * NaN would reach the weight's gradient.
    clean = hidden.masked_fill((y == c.ignore_index).unsqueeze(1), 0.0) if d_weight is not None else hidden
    size = min(rows, max(CHUNK_ROWS, CHUNK // vocabulary // 128 * 128))
    z, t = new(size, wide), None if other is None else new(size, wide)
    for logits in (z, t):
        if logits is not None and wide != vocabulary:
            logits[:, vocabulary:] = -torch.inf
    grad = torch.empty((size, wide), dtype=weight.dtype, device=device) if any(wanted) else None
    for start in range(0, rows, size):
        part, n = slice(start, min(start + size, rows)), min(size, rows - start)
        _product(hidden[part], weight.t(), z[:n, :vocabulary])
        if t is not None and other is not None:
            _product(other[0][part], other[1].t(), t[:n, :vocabulary])
        made = None if grad is None else grad[:n]
        launch_rows(z[:n], None if t is None else t[:n], (biases[0], biases[1]), y[part], stats[:, part], losses[:, part], c, made, upstream, count)
        if made is None:
            continue
        some = made[:, :vocabulary]
        if d_hidden is not None:
            _product(some, weight, d_hidden[part])
        if d_weight is not None:
            (_product if start == 0 else _add_product)(some.t(), clean[part], d_weight)
        if d_bias is not None:
            total = some.sum(0, dtype=torch.float32)
            d_bias.copy_(total) if start == 0 else d_bias.add_(total)
    return stats, losses, found


def forward(c: Call) -> Out:
    stats, losses, found = _run(c, c.wanted)
    shapes = (c.student_hidden.shape, c.student_weight.shape, c.student_weight.shape[:1])
    grads = [not_needed(stats) if x is None else x.view(shape) for x, shape in zip(found, shapes, strict=True)]
    return Out(*launch_total(losses, vector(c.target), c.normalizer, c), stats, *grads)


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    needed = needed_of(c, needs)
    scale = loss_scale(grads, saved) if kept(c, saved, needed) else None
    sums: Sequence[Tensor | None] = saved[5:] if scale is not None else _run(c, needed, grads[:3], saved.divisor)[2]
    found: list[Tensor | None] = []
    for need, x, total in zip(needed, c[:3], sums, strict=True):
        if not need or x is None or total is None:
            found.append(None)
            continue
        grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        # One pass over the float32 sums, without a temporary of their size.
        found.append(grad.copy_(total.view(x.shape)) if scale is None else torch.mul(total.view(x.shape), scale, out=grad))
    return tuple(found)


BACKENDS = (
    Backend(
        "linear_kd_loss",
        "triton",
        forward,
        backward,
        dtypes=DTYPES,
        devices=triton.DEVICES,
        limits=lambda which, c: loss_reasons(c, "teacher_weight"),
        unavailable=triton.reason,
        by_default=triton.by_default,
    ),
)


# -- what the compile gate and `cvmk bench --tune` run --------------------------------------------------------------------------------
TUNED = (ROWS,)


def _case(dtype: torch.dtype, vocabulary: int, width: int, divergence: str, bias: bool = False, teacher: bool = True) -> Case:
    def run(device: torch.device) -> Any:
        sides: list[Tensor | None] = []
        for there in (True, teacher):
            shapes = ((4096, width), (vocabulary, width), (vocabulary,))
            hidden, weight, b = (sample(shape, dtype, device, scale) for shape, scale in zip(shapes, (1.0, width**-0.5, 1.0), strict=True))
            sides += [hidden, weight, b if bias else None] if there else [None, None, None]
        y = torch.zeros(4096, dtype=torch.int64, device=device)
        options = (2.0, 0.5 if teacher else 0.0, divergence, 0.5, 0.1 if bias else 0.0, -100)
        return forward(Call(*sides, y, None, *options, [True, True, bias], False))  # type: ignore[call-arg,arg-type]

    return Case(f"{str(dtype).removeprefix('torch.')} V{vocabulary} d{width} {divergence if teacher else 'no teacher'}" + (" bias" if bias else ""), run)


CASES = (
    _case(torch.bfloat16, 32000, 512, "forward_kl"),
    _case(torch.bfloat16, 32000, 512, "js"),
    _case(torch.bfloat16, 50257, 512, "reverse_kl", bias=True),
    _case(torch.float32, 32000, 512, "skew_kl"),
    _case(torch.float16, 32000, 512, "forward_kl", teacher=False),
)
