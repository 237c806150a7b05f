"""Distances between a student's and a teacher's hidden states and attention maps, over the positions that are not padding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvmk import ops


class Projection(nn.Module):
    """Student width -> teacher width, [..., Ds] -> [..., Dt], with a bias, in the dtype of its input. It begins (semi-)orthogonal, which keeps angles."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(teacher_width, student_width))
        self.bias = nn.Parameter(torch.zeros(teacher_width))
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return ops.fused_linear(x, self.weight.to(x.dtype), self.bias)


def real_positions(lengths: Tensor, length: int) -> Tensor:
    """[B] lengths -> [B, length], true where a position is not padding."""
    return torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)


def hidden_distance(student: Tensor, teacher: Tensor, real: Tensor, projection: nn.Module) -> Tensor:
    """Mean squared error of normalised states: mean over real positions and width of (N(projection(h_s)) - N(h_t))^2.

    N subtracts the mean over the width and divides by the standard deviation (a layer norm without weights), so the distance is
    2 (1 - correlation): between 0 and 4 whatever the widths and scales, and a residual stream that grows with depth cannot blow it up.
    PKD (Sun et al. 2019) normalises likewise; the learned projection is that of FitNets and TinyBERT.

    student [B, L, Ds], teacher [B, L, Dt], real [B, L] (padding is not read) -> scalar, float32 (float64 for float64). Autocast does
    not reach inside.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    padding = ~real.unsqueeze(-1)
    with torch.autocast(student.device.type, enabled=False):
        ours = projection(student.to(dtype).masked_fill(padding, 0.0))
        theirs = teacher.detach().to(dtype).masked_fill(padding, 0.0)
        width = theirs.shape[-1:]
        difference = (F.layer_norm(ours, width) - F.layer_norm(theirs, width)).masked_fill(padding, 0.0)
        return difference.square().sum() / (real.sum().clamp(min=1) * width[0])


def attention_distance(student: Any, teacher: Any, real: Tensor) -> Tensor:
    """Mean over real queries and heads of KL(teacher's map || student's map), from queries and keys: no map is made. Where the student's map says
    its divergence, it has been compared with this teacher's while it attended.

    student, teacher: `cvmk.nn` AttentionMap or the like (q, k, scale, causal, key_lengths), with any numbers and sizes of heads (how
    heads are paired: `ops.attention_kl`); real [B, Tq] -> scalar.
    """
    rows: Tensor | None = getattr(student, "divergence", None)
    if rows is None:
        scales = {"scale": student.scale, "teacher_scale": teacher.scale}
        rows = ops.attention_kl(student.q, student.k, teacher.q, teacher.k, causal=student.causal, key_lengths=student.key_lengths, **scales)
    return rows.masked_fill(~real.unsqueeze(1), 0.0).sum() / (real.sum().clamp(min=1) * rows.shape[1])
