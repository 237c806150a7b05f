"""Positions: sinusoidal ones are added to the embeddings (Vaswani et al. 2017), rotary ones turn queries and keys (Su et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cvmk.config.schema import ModelConfig

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each [T, D / 2], or [N, 1, T, D / 2] where the rows stand at different positions."""


# -- where the positions of a call stand ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Span:
    """The T positions of N rows that one call works on.

    start    position of the first one, counted from 0: one number where all rows agree, else int64 [N].
    count    T.
    end      a number that start + T does not exceed in any row, known without reading from the device.
    lengths  [N]: of row n's T positions the first lengths[n] are real and the others padding; None where all are real.
    """

    start: int | Tensor
    count: int
    end: int
    lengths: Tensor | None = None
    rotation: Rotation | None = None

    def rotate(self, x: Tensor) -> Tensor:
        """Queries or keys [N, H, T, D] at the angles of their positions; x itself where positions are not rotary."""
        return x if self.rotation is None else rotate(x, self.rotation)

    def real(self, device: torch.device) -> Tensor | None:
        """[N, T], true where a position is real; None where all are."""
        return None if self.lengths is None else torch.arange(self.count, device=device) < self.lengths[:, None]

    def indices(self) -> Tensor:
        """The positions [N, T] of rows that do not agree."""
        assert isinstance(self.start, Tensor)
        return self.start[:, None] + torch.arange(self.count, device=self.start.device)


# -- what they do to the model -------------------------------------------------------------------------------------------
class Positions(nn.Module):
    """Tells a model where its tokens stand. This one does not: the mixers see the order by themselves.

    A table of positions is no parameter and not part of the state dict.
    """

    def place(self, span: Span) -> tuple[Tensor | None, Span]:
        """What is added to the embeddings [N, T, d] of the positions of `span`, [T, d] or [N, T, d] or None, and the span that mixers are given."""
        return None, span

    def forward(self, x: Tensor, span: Span) -> tuple[Tensor, Span]:
        """Embeddings x [N, T, d] of the positions of `span` -> the first block's input, and the span that mixers are given."""
        added, span = self.place(span)
        return x if added is None else x + added, span


class _Table(Positions):
    """Positions read from a table [..., length, width].

    The table is computed in float64 and rounded to the dtype that the module is cast to, so that it is as exact as this
    dtype allows, whatever the module was before, and whole after `to_empty`.
    """

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", self._exact().to(torch.get_default_dtype()), persistent=False)

    def _exact(self) -> Tensor:
        """The table in float64."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.table
        super()._apply(fn, recurse)
        if self.table is not before and not self.table.is_meta:
            with torch.no_grad(), torch.device("cpu"):
                exact = self._exact()
                self.table.copy_(exact if self.table.dtype == torch.float64 else exact.float())
        return self

    def _rows(self, span: Span) -> Tensor:
        """The table's rows of a span: [..., T, width], or [..., N, T, width] where rows do not agree; padding beyond the table reads its end."""
        if isinstance(span.start, int):
            return self.table[..., span.start : span.start + span.count, :]
        return self.table[..., span.indices().clamp(max=self.table.shape[-2] - 1), :]


class Sinusoidal(_Table):
    """Adds a row of the sinusoidal table to each embedding."""

    def __init__(self, config: ModelConfig) -> None:
        self._length, self._width = config.max_length, config.d_model
        super().__init__()

    def _exact(self) -> Tensor:
        return sinusoidal_table(self._length, self._width)

    def place(self, span: Span) -> tuple[Tensor | None, Span]:
        return self._rows(span), span


class Rotary(_Table):
    """Gives the span its angles, for heads of head_size channels (None: those of attention)."""

    def __init__(self, config: ModelConfig, head_size: int | None = None) -> None:
        self._length, self._head_size, self._base = config.max_length, head_size or config.d_model // config.heads, config.rotary_base
        super().__init__()

    def _exact(self) -> Tensor:
        return rotary_table(self._length, self._head_size, self._base)

    def place(self, span: Span) -> tuple[Tensor | None, Span]:
        cos, sin = self._rows(span)
        if not isinstance(span.start, int):
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return None, dataclasses.replace(span, rotation=(cos, sin))


POSITIONS: dict[str, Callable[[ModelConfig], Positions]] = {"sinusoidal": Sinusoidal, "rotary": Rotary, "none": lambda config: Positions()}


def sinusoidal_table(length: int, width: int) -> Tensor:
    """float64 [length, width]: column 2i holds sin(p / 10000^(2i / width)), column 2i + 1 the cosine; p counts from 0."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]


def rotary_table(length: int, head_size: int, base: float) -> Tensor:
    """float64 [2, length, head_size / 2]: cos and sin of p * base^(-2i / head_size); p counts from 0."""
    frequencies = torch.exp(torch.arange(0, head_size, 2, dtype=torch.float64) * (-math.log(base) / head_size))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x [B, H, T, D] with the pairs (x_i, x_{i + D/2}) of each position turned by its angle."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
