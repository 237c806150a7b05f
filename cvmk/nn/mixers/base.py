"""The interface of a mixer: whole sequences in training, a few new positions at a time in decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from cvmk.config.schema import ModelConfig
from cvmk.nn.outputs import AttentionMap, MapWish
from cvmk.nn.positions import Span
from cvmk.nn.state import MixerState, StateLayout


class Mixer(nn.Module, ABC):
    """Mixes the positions of a sequence. The block around it does norm, dropout and the residual sum.

    causal             told by the block: a position must not see later ones. A decoder's mixers are causal, an encoder's where
                       the model says so. A mixer that cannot be what it is told raises ConfigError.
    has_attention_map  whether `forward` returns an attention map when asked for one: distillation pairs only blocks that do.
    reads_max_length   whether what it computes depends on model.max_length, so that states of one length are not those of another.

    What is added to the residual stream comes from a `Linear` marked `residual_output`; parameters that decay are named in an
    attribute `decayed` of the module that owns them (see `cvmk.nn.decays`).
    """

    has_attention_map: ClassVar[bool] = False
    reads_max_length: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    @abstractmethod
    def forward(self, x: Tensor, span: Span, return_map: MapWish) -> tuple[Tensor, AttentionMap | None]:
        """x [B, T, d], whole sequences that stand as `span` says -> [B, T, d] and, where asked for and there is one, the attention map.

        A `return_map` that is a teacher's map may be compared with while attending: the map then says the divergence. It is computed
        from the map where that does not.

        Padding (behind span.lengths) must not reach real positions; what is returned for it is open. span.rotate turns queries
        and keys where positions are rotary, and a mixer without any need not call it.
        """

    @abstractmethod
    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        """The tensors that the mixer remembers a row, in a model of this dtype. Asked of causal mixers only."""

    @abstractmethod
    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        """x [N, T, d], the next T positions of each row -> [N, T, d]; the state is updated in place.

        It is then that at each row's last real position (span.lengths), so that a row goes on from there whatever padding it
        had. The result is that of `forward` over everything so far, at these positions.
        """

    def start(self, rows: int, max_length: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        """The state of rows that have taken no position yet, with room for max_length of them."""
        return MixerState(self.state_layout(dtype), rows, max_length, device)
