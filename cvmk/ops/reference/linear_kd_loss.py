"""Reference of `linear_kd_loss`: the logits of a chunk of rows, their loss, and at once what they add to the gradients.

The gradients of the loss by itself are made in the forward pass, before the normaliser and unscaled, in float32 (float64 for float64);
the backward pass multiplies them into fresh tensors, so it may run twice. Where a part is differentiated too it makes the logits again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import accumulation_dtype, not_needed
from cvmk.ops.kd_loss import row_dtype
from cvmk.ops.linear_kd_loss import Call, Out, kept, loss_scale, lowered, needed_of
from cvmk.ops.reference.kd_loss import Terms, checked_gradients, checked_losses, combine, put, row_chunks, scales, take, totals, valid_targets

CPU_CHUNK, GPU_CHUNK = 2**20, 2**25
CPU_ROWS, GPU_ROWS = 64, 1024
"""A chunk has CHUNK logits, or ROWS rows where those are more: fewer rows would read the weights too often."""


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of one dtype, summed and returned in the accumulation dtype: half-precision logits are never rounded."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@dataclass
class _Side:
    """Student or teacher: hidden [N, D], weight [V, D], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Side:
        """The operands as they are multiplied: half precision on the CPU as float32, which has the exact products."""
        half = weight.dtype in (torch.bfloat16, torch.float16) and not weight.is_cuda
        return _Side(hidden.reshape(-1, hidden.shape[-1]), weight.float() if half else weight, bias)

    def logits(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits [n, V] of the rows `part` [n, D]."""
        logits = _product(part, self.weight.t()).to(dtype)
        return logits if self.bias is None else logits + self.bias.to(dtype)


@dataclass
class _Gradients:
    """Sums of the gradients in the accumulation dtype, of those that are wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(student: _Side, dtype: torch.dtype, wanted: list[bool]) -> _Gradients:
        hidden, weight = student.hidden, student.weight
        return _Gradients(
            torch.zeros_like(hidden, dtype=dtype) if wanted[0] else None,
            torch.zeros_like(weight, dtype=dtype) if wanted[1] else None,
            weight.new_zeros(weight.shape[0], dtype=dtype) if wanted[2] else None,
        )

    def add(self, rows: slice | Tensor, blank: Tensor | None, part: Tensor, weight: Tensor, grad: Tensor) -> None:
        """What the gradient of a chunk's logits [n, V] adds; `part` are the chunk's hidden states."""
        grad = grad if blank is None else grad.masked_fill_(blank, 0.0)
        lower = grad.to(weight.dtype)
        if self.hidden is not None:
            put(self.hidden, rows, _product(lower, weight), None)
        if self.weight is not None:
            if part.dtype == self.weight.dtype:
                self.weight.addmm_(lower.t(), part)
            else:
                self.weight.add_(_product(lower.t(), part))
        if self.bias is not None:
            self.bias.add_(grad.sum(0))


def _chunk_size(valid: Tensor, vocabulary: int, recorded: bool) -> int:
    if recorded:
        return max(1, valid.shape[0])
    elements, rows = (CPU_CHUNK, CPU_ROWS) if valid.device.type == "cpu" else (GPU_CHUNK, GPU_ROWS)
    return max(rows, elements // vocabulary)


def _sides(c: Call) -> tuple[_Side, _Side | None]:
    student = _Side.of(c.student_hidden, c.student_weight, c.student_bias)
    if c.teacher_hidden is None or c.teacher_weight is None:
        return student, None
    return student, _Side.of(c.teacher_hidden, c.teacher_weight, c.teacher_bias)


def forward(c: Call) -> Out:
    c = lowered(c)
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in c[:3])
    terms, dtype, exact = Terms.of(c), accumulation_dtype(c.student_hidden.dtype), row_dtype(c, c.student_hidden.dtype)
    student, teacher = _sides(c)
    y, valid = valid_targets(c.target, c.ignore_index, c.student_weight.shape[0])
    stats = student.hidden.new_zeros((5, y.shape[0]), dtype=exact)
    sums = _Gradients.zeros(student, dtype, c.wanted)
    one = stats.new_ones(())
    kd_scale, ce_scale = scales(one, None, None, teacher is not None, c.alpha, c.temperature)
    kd_rows, ce_rows = [], []
    for rows, blank in row_chunks(valid, _chunk_size(valid, c.student_weight.shape[0], recorded)):
        part = take(student.hidden, rows, blank, student.weight.dtype)
        z = student.logits(part, exact)
        t = None if teacher is None else teacher.logits(take(teacher.hidden, rows, blank, teacher.weight.dtype), exact)
        kd, ce, some = checked_losses(z, t, y[rows], terms, recorded)
        stats[:, rows] = some
        kd_rows.append(kd if blank is None else kd.masked_fill(blank.squeeze(1), 0.0))
        ce_rows.append(ce if blank is None else ce.masked_fill(blank.squeeze(1), 0.0))
        if any(c.wanted):
            with torch.no_grad():
                sums.add(rows, blank, part, student.weight, checked_gradients(z, t, y[rows], some, kd_scale, ce_scale, terms))
    count = (valid.sum().clamp(min=1) if c.normalizer is None else c.normalizer).to(dtype, copy=True)
    kd, ce = c.temperature**2 * totals(kd_rows, stats, exact) / count, totals(ce_rows, stats, exact) / count
    d_hidden, d_weight, d_bias = (not_needed(count) if x is None else x for x in (sums.hidden, sums.weight, sums.bias))
    d_hidden = d_hidden.view(c.student_hidden.shape) if c.wanted[0] else d_hidden
    return Out(combine(kd, ce, c.alpha).to(dtype), kd.to(dtype), ce.to(dtype), count, stats, d_hidden, d_weight, d_bias)


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    needed = needed_of(c, needs)
    scale = loss_scale(grads, saved) if kept(c, saved, needed) else None
    sums = _Gradients(*saved[5:]) if scale is not None else _gradients(grads, lowered(c), saved, needed)
    found: list[Tensor | None] = []
    for need, x, total in zip(needed, c[:3], (sums.hidden, sums.weight, sums.bias), strict=True):
        if not need or x is None or total is None:
            found.append(None)
            continue
        found.append((total if scale is None else total * scale).to(x.dtype).view(x.shape))
    return tuple(found)


def _gradients(grads: Out, c: Call, saved: Out, needed: list[bool]) -> _Gradients:
    """The gradients from the logits, which are made again."""
    student, teacher = _sides(c)
    dtype, exact = saved.divisor.dtype, saved.stats.dtype
    sums = _Gradients.zeros(student, dtype, needed)
    kd_scale, ce_scale = scales(grads.loss, grads.kd, grads.ce, teacher is not None, c.alpha, c.temperature)
    kd_scale, ce_scale = (None if x is None else x / saved.divisor for x in (kd_scale, ce_scale))
    if kd_scale is None and ce_scale is None:
        return sums
    y, valid = valid_targets(c.target, c.ignore_index, c.student_weight.shape[0])
    for rows, blank in row_chunks(valid, _chunk_size(valid, c.student_weight.shape[0], False)):
        part = take(student.hidden, rows, blank, student.weight.dtype)
        t = None if teacher is None or kd_scale is None else teacher.logits(take(teacher.hidden, rows, blank, teacher.weight.dtype), exact)
        grad = checked_gradients(student.logits(part, exact), t, y[rows], saved.stats[:, rows], kd_scale, ce_scale, Terms.of(c))
        sums.add(rows, blank, part, student.weight, grad)
    return sums


BACKENDS = (Backend("linear_kd_loss", "reference", forward, backward),)
