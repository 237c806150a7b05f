"""A mixer that reads each row from one side, or, for an encoder that is not causal, from both with half the width each.

The two directions are put side by side before the output layer (as in a bidirectional recurrent network, Schuster & Paliwal 1997),
so that they have as many parameters in matrices as one direction of the full width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.nn.linear import Linear
from cvmk.nn.mixers.base import Mixer
from cvmk.nn.outputs import AttentionMap, MapWish
from cvmk.nn.positions import Span
from cvmk.nn.state import MixerState, StateLayout


class Direction(nn.Module, ABC):
    """What reads rows from the left, without the output layer. Methods are those of `Mixer`, for results [N, T, outputs].

    outputs  the width of the results, told by the subclass.
    """

    outputs: int

    @abstractmethod
    def __init__(self, config: ModelConfig, width: int) -> None:
        """`width` is model.d_model, or half of it where there are two directions. Raises ConfigError for one that does not fit."""
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor, span: Span) -> Tensor:
        """Whole sequences x [B, T, d] -> [B, T, outputs]; padding on the right reaches nothing."""

    def from_the_end(self, x: Tensor, span: Span) -> Tensor:
        """As `forward`, of rows that are read from each one's last real position to its first."""
        return turned(self(turned(x, span.lengths), span), span.lengths)

    @abstractmethod
    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        """As `Mixer.state_layout`."""

    @abstractmethod
    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        """As `Mixer.extend`, x [N, T, d] -> [N, T, outputs]."""


class DirectedMixer(Mixer):
    """out(forwards(x)) where it is causal, else out([forwards(x); backwards(x)]), the second from each row's last real position to its first."""

    direction: ClassVar[type[Direction]]

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__(config, causal)
        if not causal and config.d_model % 2:
            raise ConfigError(f"model.d_model is {config.d_model}, and must be even for an encoder of two directions: change it, or encoder_direction")
        width = config.d_model if causal else config.d_model // 2
        self.forwards = self.direction(config, width)
        self.backwards = None if causal else self.direction(config, width)
        outputs = self.forwards.outputs * (1 if causal else 2)
        self.out = Linear(outputs, config.d_model, bias=config.bias, residual_output=True)

    def forward(self, x: Tensor, span: Span, return_map: MapWish) -> tuple[Tensor, AttentionMap | None]:
        mixed = self.forwards(x, span)
        if self.backwards is not None:
            mixed = torch.cat((mixed, self.backwards.from_the_end(x, span)), dim=-1)
        return self.out(mixed), None

    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        return self.forwards.state_layout(dtype)

    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        extended: Tensor = self.out(self.forwards.extend(x, span, state))
        return extended


def turned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [N, T, ...] with the first lengths [N] (None: all) positions of each row in reverse order, and the padding behind them where it was."""
    if lengths is None:
        return x.flip(1)
    at, lengths = torch.arange(x.shape[1], device=x.device), lengths[:, None]
    order = torch.where(at < lengths, lengths - 1 - at, at)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], order]


def split_heads(config: ModelConfig, width: int) -> tuple[int, int]:
    """How many heads a direction of this width has, and their size: that of the model's heads, or, in half of an odd number of them, half of it."""
    size = config.d_model // config.heads
    return (width // size, size) if width % size == 0 else (config.heads, width // config.heads)
