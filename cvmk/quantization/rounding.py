"""Grids of quantised weights: scales and zero points of groups, and the nearest values on them, for solvers that choose ranges or values themselves.

Weights are [N, K]; a group is g neighbouring inputs of one output. With 8 bits a row is one group of 255 steps, symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cvmk.ops import QuantizedWeight, quantize_int4, quantize_int8
from cvmk.ops.quantize import pack_int4

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Grid:
    """What a group's values may be: (q - zero) * scale for q = low ... high. `bits` 8 or 4; `group` is K where a row is one group."""

    bits: int
    group: int
    symmetric: bool = True

    @property
    def range(self) -> tuple[int, int]:
        return (-127, 127) if self.bits == 8 else (0, 15)

    def fit(self, weight: Tensor, shrink: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Scales (float32 numbers in weight's dtype) and zeros of groups [..., g] whose range is `shrink` [...] of that of their weights.

        As `ops.quantize_int8` and `quantize_int4` have them: 8 bits max|w| / 127; 4 bits symmetric max|w| / 7.5 with zero 8, otherwise
        (max(w, 0) - min(w, 0)) / 15 with zero round(-min(w, 0) / scale).
        """
        if self.bits == 8 or self.symmetric:
            steps = weight.abs().amax(-1) * shrink / (127 if self.bits == 8 else 7.5)
            zeros = torch.full_like(steps, 0.0 if self.bits == 8 else 8.0)
            return _stored(steps, self.bits), zeros
        low, high = weight.amin(-1).clamp(max=0) * shrink, weight.amax(-1).clamp(min=0) * shrink
        scales = _stored((high - low) / 15, self.bits)
        return scales, (-low / scales).round().clamp(0, 15)

    def values(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest values q of weights [..., g], as whole numbers in weight's dtype."""
        return (weight / scales[..., None]).round().add_(zeros[..., None]).clamp_(*self.range)

    def rounded(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest weights [..., g] on the grid."""
        return (self.values(weight, scales, zeros) - zeros[..., None]) * scales[..., None]

    def groups(self, weight: Tensor) -> Tensor:
        """[N, K] -> [N, groups, g], a view."""
        apart: Tensor = weight.unflatten(1, (-1, self.group))
        return apart

    def nearest(self, weight: Tensor) -> QuantizedWeight:
        """Rounding to nearest."""
        weight = weight.float()
        return quantize_int8(weight) if self.bits == 8 else quantize_int4(weight, self.group, symmetric=self.symmetric)

    def weight(self, values: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None = None) -> QuantizedWeight:
        """Of values [N, K] (inputs in stored order), scales and zeros [N, groups]."""
        if self.bits == 8:
            return QuantizedWeight.from_tensors({"values": values.to(torch.int8), "scales": scales.float().flatten()})
        tensors = {"values": pack_int4(values.to(torch.uint8)), "scales": scales.float()}
        if not self.symmetric:
            tensors["zeros"] = zeros.to(torch.uint8)
        if order is not None:
            tensors["order"] = order.to(torch.int32)
        return QuantizedWeight.from_tensors(tensors)


def _stored(steps: Tensor, bits: int) -> Tensor:
    """Scales as they will be stored."""
    scales = steps.float()
    floor = torch.full_like(scales, _TINY)
    kept = torch.maximum(scales, floor) if bits == 8 else torch.where(scales == 0, 1.0, torch.maximum(scales, floor))
    return kept.to(steps.dtype)
