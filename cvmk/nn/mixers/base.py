"""The interface of a mixer: whole sequences in training, a few new positions at a time in decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from cvmk.config.schema import ModelConfig
from cvmk.nn.outputs import AttentionMap
from cvmk.nn.positions import Rotation


class MixerState(ABC):
    """What one mixer remembers of the positions decoded so far, one row a hypothesis."""

    @abstractmethod
    def reorder(self, rows: Tensor, length: int) -> None:
        """Row i becomes what row rows[i] was; the number of rows stays. `length` positions are filled."""

    @abstractmethod
    def select(self, rows: Tensor, length: int) -> None:
        """Keep only these rows, in this order. `length` positions are filled."""


class Mixer(nn.Module, ABC):
    """Mixes the positions of a sequence. The block around it does norm, dropout and the residual sum.

    has_attention_map says whether `forward` returns an attention map when asked for one: distillation pairs only blocks that do.
    """

    has_attention_map: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    @abstractmethod
    def forward(self, x: Tensor, lengths: Tensor | None, rotation: Rotation | None, return_map: bool) -> tuple[Tensor, AttentionMap | None]:
        """x [B, T, d] -> [B, T, d] and, where asked for and where there is one, the attention map.

        Positions at or beyond lengths [B] are padding and must not reach the others; None where nothing has to be
        hidden (a causal mixer never sees the padding to its right).
        """

    @abstractmethod
    def start(self, rows: int, max_length: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        """An empty state for `rows` hypotheses of up to max_length positions. Only for causal mixers."""

    @abstractmethod
    def extend(self, x: Tensor, state: MixerState, position: int, rotation: Rotation | None) -> Tensor:
        """x [N, T, d], the positions from `position` on -> [N, T, d]; the state is updated in place."""

