"""Positions: the sinusoidal table (Vaswani et al. 2017) and rotary positions (Su et al. 2021, halves rotated together)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each [T, D / 2]."""


def sinusoidal_table(length: int, width: int) -> Tensor:
    """[length, width]: column 2i holds sin(p / 10000^(2i / width)), column 2i + 1 the cosine; p counts from 0."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
    return table[:, :width].to(torch.get_default_dtype())


def rotary_table(length: int, head_size: int, base: float) -> Tensor:
    """[2, length, head_size / 2]: cos and sin of p * base^(-2i / head_size); p counts from 0."""
    frequencies = torch.exp(torch.arange(0, head_size, 2, dtype=torch.float64) * (-math.log(base) / head_size))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin())).to(torch.get_default_dtype())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x [B, H, T, D] with the pairs (x_i, x_{i + D/2}) of each position turned by its angle."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
