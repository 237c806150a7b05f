"""CVMTransformer: a pre-norm encoder-decoder whose blocks name their mixer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.nn.blocks import DecoderBlock, EncoderBlock, make_norm
from cvmk.nn.cache import DecoderState, Memory
from cvmk.nn.embeddings import Embeddings
from cvmk.nn.linear import scale_residual_outputs
from cvmk.nn.mixers import mixer_names
from cvmk.nn.outputs import AttentionMaps, HiddenStates
from cvmk.nn.positions import Rotation, rotary_table, sinusoidal_table


class Stack(nn.Module):
    """The blocks of one side and the norm after the last one. Parameters: `blocks.<i>...` and `norm...`."""

    blocks: Any

    def __init__(self, config: ModelConfig, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(config)
        scale_residual_outputs(self.blocks)


class CVMTransformer(nn.Module):
    """Encoder-decoder after Vaswani et al. 2017 with the variants of ModelConfig.

    Token ids run from 0 to vocab_size - 1; pad_id fills rows on the right and must not occur inside them. The
    positions table is no parameter and not part of the state dict.
    """

    positions: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int, pad_id: int = 0) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.embeddings = Embeddings(config, vocab_size)
        self.encoder = Stack(config, [EncoderBlock(config, name) for name in mixer_names([*config.encoder_mixers], config.encoder_layers)])
        self.decoder = Stack(config, [DecoderBlock(config, name) for name in mixer_names([*config.decoder_mixers], config.decoder_layers)])
        self.dropout = nn.Dropout(config.dropout)
        if config.positions == "rotary":
            table = rotary_table(config.max_length, config.d_model // config.heads, config.rotary_base)
        else:
            table = sinusoidal_table(config.max_length, config.d_model)
        self.register_buffer("positions", table, persistent=False)

    # -- whole sequences ---------------------------------------------------------------------------------------------
    def forward(
        self, src: Tensor, tgt: Tensor, *, return_hidden: bool = False, return_attention: bool = False
    ) -> tuple[Tensor, HiddenStates | None, AttentionMaps | None]:
        """Logits [B, T, V] of the tokens that follow each position of the decoder input.

        src [B, S] and tgt [B, T] are integers, padded with pad_id on the right; tgt begins with BOS. A row of src may be
        padding only. Hidden states are the blocks' outputs before the final norm. Raises ConfigError where a side is
        longer than model.max_length.
        """
        hidden = HiddenStates() if return_hidden else None
        maps = AttentionMaps() if return_attention else None
        memory, lengths = self._encode(src, hidden, maps)
        x, rotation = self._embed(self.embeddings.embed_target(tgt), 0)
        for block in self.decoder.blocks:
            x, own, cross = block(x, memory, lengths, rotation, return_attention)
            if hidden is not None:
                hidden.decoder.append(x)
            if maps is not None:
                maps.decoder += [own] if own is not None else []
                maps.cross.append(cross)
        return self.embeddings.logits(self.decoder.norm(x)), hidden, maps

    def _encode(self, src: Tensor, hidden: HiddenStates | None, maps: AttentionMaps | None) -> tuple[Tensor, Tensor]:
        lengths = (src != self.pad_id).sum(dim=1)
        x, rotation = self._embed(self.embeddings.embed_source(src), 0)
        for block in self.encoder.blocks:
            x, attention = block(x, lengths, rotation, maps is not None)
            if hidden is not None:
                hidden.encoder.append(x)
            if maps is not None and attention is not None:
                maps.encoder.append(attention)
        return self.encoder.norm(x), lengths

    def _embed(self, x: Tensor, position: int) -> tuple[Tensor, Rotation | None]:
        """Embeddings [B, T, d] of the positions from `position` on -> the first block's input, and the angles of these positions."""
        end = position + x.shape[1]
        if end > self.config.max_length:
            raise ConfigError(f"a sequence of {end} tokens is longer than model.max_length = {self.config.max_length}: shorten it or train with a larger one")
        if self.config.positions == "rotary":
            cos, sin = self.positions[:, position:end]
            return self.dropout(x), (cos, sin)
        return self.dropout(x + self.positions[position:end]), None

    # -- step by step ------------------------------------------------------------------------------------------------
    def encode(self, src: Tensor) -> Memory:
        """Encode src [B, S] (integers, padded with pad_id on the right) and compute what every decoding step reads of it."""
        output, lengths = self._encode(src, None, None)
        cross = []
        for block in self.decoder.blocks:
            keys, values = block.cross.keys_values(output)
            cross.append((keys.contiguous(), values.contiguous()))
        return Memory(output, lengths, cross, padded=bool((lengths < src.shape[1]).any()))

    def start(self, memory: Memory, max_length: int, copies: int = 1) -> DecoderState:
        """An empty state for `copies` hypotheses of each sentence with room for max_length tokens, BOS included.

        Raises ConfigError where max_length is beyond model.max_length.
        """
        if max_length > self.config.max_length:
            raise ConfigError(f"max_length {max_length} is more than model.max_length = {self.config.max_length}: ask for less or train with a larger one")
        output = memory.output
        rows = output.shape[0] * copies
        mixers = [block.mixer.start(rows, max_length, output.device, output.dtype) for block in self.decoder.blocks]
        return DecoderState(memory, mixers, max_length, copies)

    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Feed one token a hypothesis, [N] (BOS first) -> logits [N, V] of the next one. Call it without gradients."""
        return self.embeddings.logits(self._extend(tokens[:, None], state)[:, 0])

    def extend(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Feed T tokens a hypothesis at once, [N, T] -> logits [N, T, V]; the same as T steps. Call it without gradients."""
        return self.embeddings.logits(self._extend(tokens, state))

    def _extend(self, tokens: Tensor, state: DecoderState) -> Tensor:
        if tokens.shape[0] != state.rows:
            raise ValueError(f"tokens have {tokens.shape[0]} rows and the state has {state.rows}: give one row a hypothesis")
        end = state.position + tokens.shape[1]
        if end > state.max_length:
            raise ValueError(f"the state has room for {state.max_length} tokens and this would be token {end}: start() with a larger max_length")
        x, rotation = self._embed(self.embeddings.embed_target(tokens), state.position)
        for layer, block in enumerate(self.decoder.blocks):
            x = block.extend(x, layer, state, rotation)
        state.position = end
        return self.decoder.norm(x)

