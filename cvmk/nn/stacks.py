"""The blocks of one side, one after the other, and the norm after the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cvmk.config.schema import ModelConfig
from cvmk.nn.blocks import DecoderBlock, EncoderBlock, Source, make_norm
from cvmk.nn.linear import scale_residual_outputs
from cvmk.nn.memory import Memory
from cvmk.nn.mixers import mixer_names
from cvmk.nn.outputs import AttentionMaps, HiddenStates
from cvmk.nn.positions import Span
from cvmk.nn.residual import first_norm
from cvmk.nn.state import MixerState, StateLayout


class Stack(nn.Module):
    """Parameters: `blocks.<i>...` and `norm...`."""

    blocks: Any

    def __init__(self, config: ModelConfig, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(config)
        scale_residual_outputs(self.blocks)

    @property
    def norms(self) -> list[nn.Module]:
        """The norm before each block, and the last one."""
        return [*(block.mixer_norm for block in self.blocks), self.norm]

    def layouts(self, dtype: torch.dtype) -> list[StateLayout]:
        """What each block, if it is causal, remembers a row in a model of this dtype."""
        return [block.mixer.state_layout(dtype) for block in self.blocks]


class Encoder(Stack):
    """`causal` where a position sees none behind it, so that a source can grow."""

    def __init__(self, config: ModelConfig) -> None:
        causal = config.encoder_direction == "causal"
        super().__init__(config, [EncoderBlock(config, name, causal) for name in mixer_names([*config.encoder_mixers], config.encoder_layers)])
        self.causal = causal

    def forward(
        self, x: Tensor, span: Span, states: list[MixerState] | None = None, hidden: HiddenStates | None = None, maps: AttentionMaps | None = None
    ) -> Tensor:
        """x [B, T, d] -> [B, T, d] behind the last norm: whole sentences, or the next positions of those that `states` remember."""
        norms = self.norms
        normed = first_norm(x, norms[0])
        for layer, block in enumerate(self.blocks):
            state = states[layer] if states is not None else None
            x, normed, own = block(x, normed, norms[layer + 1], span, state, maps is not None and maps.wish("encoder"))
            if hidden is not None:
                hidden.encoder.append(x)
            if maps is not None and own is not None:
                maps.encoder.append(own)
        return normed


class Decoder(Stack):
    """Causal blocks with cross-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, [DecoderBlock(config, name) for name in mixer_names([*config.decoder_mixers], config.decoder_layers)])

    def forward(
        self, x: Tensor, span: Span, memory: Tensor, lengths: Tensor, hidden: HiddenStates | None = None, maps: AttentionMaps | None = None
    ) -> Tensor:
        """Whole sequences x [B, T, d] over memory [B, S, d], of which the first lengths [B] positions are real -> [B, T, d] behind the last norm."""
        norms = self.norms
        normed = first_norm(x, norms[0])
        for layer, block in enumerate(self.blocks):
            keys, values = block.cross.keys_values(memory)
            own_wish, cross_wish = (False, False) if maps is None else (maps.wish("decoder"), maps.wish("cross"))
            x, normed, own, cross = block(x, normed, norms[layer + 1], span, Source(keys, values, lengths), None, own_wish, cross_wish)
            if hidden is not None:
                hidden.decoder.append(x)
            if maps is not None:
                maps.decoder += [own] if own is not None else []
                maps.cross.append(cross)
        return normed

    def extend(self, x: Tensor, span: Span, memory: Memory, states: list[MixerState], maps: AttentionMaps | None = None) -> Tensor:
        """The next positions x [N, T, d] of rows that `states` remember -> [N, T, d] behind the last norm. `maps` gets those of cross-attention."""
        norms, lengths = self.norms, memory.lengths if memory.padded else None
        normed = first_norm(x, norms[0])
        for layer, block in enumerate(self.blocks):
            keys, values = memory.cross[layer]
            x, normed, _, cross = block(x, normed, norms[layer + 1], span, Source(keys, values, lengths), states[layer], False, maps is not None)
            if maps is not None:
                maps.cross.append(cross)
        return normed
