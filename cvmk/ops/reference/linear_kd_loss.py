"""Reference of `linear_kd_loss`: the logits of a chunk of rows, their loss, and at once what they add to the gradients.

The gradients of the loss by itself are made in the forward pass, before the normaliser and unscaled, in float32 (float64 for float64);
the backward pass multiplies them into fresh tensors, so it may run twice. Where a part is differentiated too it makes the logits again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cvmk.ops._dispatch import Backend, accumulation_dtype, not_needed
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


def _forward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    target: Tensor,
    normalizer: Tensor | None,
    temperature: float,
    alpha: float,
    divergence: str,
    mixture: float,
    label_smoothing: float,
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    tensors = (student_hidden, student_weight, student_bias)
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    terms, dtype = Terms(temperature, divergence, mixture, label_smoothing), accumulation_dtype(student_hidden.dtype)
    student = _Side.of(*tensors)
    teacher = None if teacher_hidden is None or teacher_weight is None else _Side.of(teacher_hidden, teacher_weight, teacher_bias)
    y, valid = valid_targets(target, ignore_index, student_weight.shape[0])
    stats = student.hidden.new_zeros((5, y.shape[0]), dtype=dtype)
    sums = _Gradients.zeros(student, dtype, wanted)
    one = stats.new_ones(())
    kd_scale, ce_scale = scales(one, None, None, teacher is not None, alpha, temperature)
    kd_rows, ce_rows = [], []
    for rows, blank in row_chunks(valid, _chunk_size(valid, student_weight.shape[0], recorded)):
        part = take(student.hidden, rows, blank, student.weight.dtype)
        z = student.logits(part, dtype)
        t = None if teacher is None else teacher.logits(take(teacher.hidden, rows, blank, teacher.weight.dtype), dtype)
        kd, ce, some = checked_losses(z, t, y[rows], terms, recorded)
        stats[:, rows] = some
        kd_rows.append(kd if blank is None else kd.masked_fill(blank.squeeze(1), 0.0))
        ce_rows.append(ce if blank is None else ce.masked_fill(blank.squeeze(1), 0.0))
        if any(wanted):
            with torch.no_grad():
                sums.add(rows, blank, part, student.weight, checked_gradients(z, t, y[rows], some, kd_scale, ce_scale, terms))
    count = (valid.sum().clamp(min=1) if normalizer is None else normalizer).to(dtype, copy=True)
    kd, ce = temperature**2 * totals(kd_rows, stats, dtype) / count, totals(ce_rows, stats, dtype) / count
    d_hidden, d_weight, d_bias = (not_needed(stats) if x is None else x for x in (sums.hidden, sums.weight, sums.bias))
    return combine(kd, ce, alpha), kd, ce, count, stats, d_hidden.view(student_hidden.shape) if wanted[0] else d_hidden, d_weight, d_bias


def _backward(
    g_loss: Tensor | None,
    g_kd: Tensor | None,
    g_ce: Tensor | None,
    g_count: Tensor | None,
    g_stats: Tensor | None,
    g_d_hidden: Tensor | None,
    g_d_weight: Tensor | None,
    g_d_bias: Tensor | None,
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    target: Tensor,
    normalizer: Tensor | None,
    count: Tensor,
    stats: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    temperature: float,
    alpha: float,
    divergence: str,
    mixture: float,
    label_smoothing: float,
    ignore_index: int,
    wanted: list[bool],
    needs: list[bool],
) -> tuple[Tensor, ...]:
    tensors = (student_hidden, student_weight, student_bias)
    needed = [need and x is not None for need, x in zip(needs, tensors, strict=False)]
    if g_kd is None and g_ce is None and g_loss is not None and all(have or not need for have, need in zip(wanted, needed, strict=True)):
        scale, sums = g_loss / count, _Gradients(d_hidden, d_weight, d_bias)
    else:
        scale, terms, dtype = torch.ones_like(count), Terms(temperature, divergence, mixture, label_smoothing), count.dtype
        student = _Side.of(*tensors)
        teacher = None if teacher_hidden is None or teacher_weight is None else _Side.of(teacher_hidden, teacher_weight, teacher_bias)
        sums = _Gradients.zeros(student, dtype, needed)
        kd_scale, ce_scale = scales(g_loss, g_kd, g_ce, teacher is not None, alpha, temperature)
        kd_scale, ce_scale = (None if x is None else x / count for x in (kd_scale, ce_scale))
        y, valid = valid_targets(target, ignore_index, student_weight.shape[0])
        for rows, blank in row_chunks(valid, _chunk_size(valid, student_weight.shape[0], False)):
            if kd_scale is None and ce_scale is None:
                break
            part = take(student.hidden, rows, blank, student.weight.dtype)
            t = None if teacher is None or kd_scale is None else teacher.logits(take(teacher.hidden, rows, blank, teacher.weight.dtype), dtype)
            grad = checked_gradients(student.logits(part, dtype), t, y[rows], stats[:, rows], kd_scale, ce_scale, terms)
            sums.add(rows, blank, part, student.weight, grad)
    found = []
    for need, x, total in zip(needed, tensors, (sums.hidden, sums.weight, sums.bias), strict=True):
        found.append((total * scale).to(x.dtype).view(x.shape) if need and x is not None and total is not None else not_needed(student_hidden))
    return tuple(found)


BACKENDS = (Backend("linear_kd_loss", "reference", _forward, _backward),)
