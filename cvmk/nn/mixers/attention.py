"""Multi-head attention with grouped keys and values (Ainslie et al. 2023): over the own sequence, and over the encoder's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvmk import ops
from cvmk.config.schema import ModelConfig
from cvmk.nn.linear import Linear
from cvmk.nn.mixers.base import Mixer
from cvmk.nn.outputs import AttentionMap, MapWish
from cvmk.nn.positions import Span
from cvmk.nn.state import GROWS, MixerState, StateLayout, StateTensor
from cvmk.ops.quantize import rounded_rows


class _Heads:
    """Sizes of an attention's heads, and the call of the op. `byte_cache`: what is remembered is rounded to bytes; see `CVMTransformer.keep_caches`."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        self.size = config.d_model // config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.q_width = config.d_model
        self.kv_width = self.kv_heads * self.size
        self.scale = self.size**-0.5
        self.dropout = config.attention_dropout
        self.causal = causal
        self.byte_cache = False

    def split(self, x: Tensor) -> Tensor:
        """[B, T, heads * D] -> [B, heads, T, D], a view."""
        apart: Tensor = x.unflatten(-1, (-1, self.size))
        return apart.transpose(1, 2)

    def layout(self, dtype: torch.dtype) -> StateLayout:
        """A row's keys and values, each [Hkv, positions, D]."""
        entry = StateTensor((self.kv_heads, GROWS, self.size), dtype)
        return {"keys": entry, "values": entry}

    def remembered(self, x: Tensor) -> Tensor:
        """Keys or values [B, Hkv, T, D] as later positions read them."""
        return rounded_rows(x) if self.byte_cache else x

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, causal: bool, training: bool, query_start: Tensor | None = None
    ) -> Tensor:
        """q [B, H, Tq, D], k and v [B, Hkv, Tk, D] -> the heads side by side, [B, Tq, H * D]. Arguments are those of the op."""
        dropout = self.dropout if training else 0.0
        mixed = ops.flash_attention(q, k, v, causal=causal, key_lengths=key_lengths, query_start=query_start, scale=self.scale, dropout_p=dropout)
        assert isinstance(mixed, Tensor)
        return mixed.transpose(1, 2).flatten(2)

    def attend_mapped(
        self, q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, training: bool, wish: MapWish
    ) -> tuple[Tensor, AttentionMap | None]:
        """`attend` as the model says, and the map that is wished for; its divergence only where no weight is dropped, which the op does not do."""
        if not isinstance(wish, AttentionMap) or (training and self.dropout):
            mixed = self.attend(q, k, v, key_lengths, self.causal, training)
            return mixed, AttentionMap(q, k, self.scale, self.causal, key_lengths) if wish else None
        scales = {"scale": self.scale, "teacher_scale": wish.scale}
        mixed, divergence = ops.flash_attention_distill(q, k, v, wish.q, wish.k, causal=self.causal, key_lengths=key_lengths, **scales)
        return mixed.transpose(1, 2).flatten(2), AttentionMap(q, k, self.scale, self.causal, key_lengths, divergence)


class SelfAttention(Mixer):
    """`qkv` has the rows [q; k; v] and `out` brings the heads back to d_model."""

    has_attention_map = True

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__(config, causal)
        self.heads = _Heads(config, causal)
        self.qkv = Linear(config.d_model, (self.heads.q_width, self.heads.kv_width, self.heads.kv_width), bias=config.bias)
        self.out = Linear(config.d_model, config.d_model, bias=config.bias, residual_output=True)

    def _project(self, x: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.heads
        q, k, v = (heads.split(part) for part in self.qkv(x).split((heads.q_width, heads.kv_width, heads.kv_width), dim=-1))
        return span.rotate(q), span.rotate(k), v

    def forward(self, x: Tensor, span: Span, return_map: MapWish) -> tuple[Tensor, AttentionMap | None]:
        q, k, v = self._project(x, span)
        lengths = None if self.causal else span.lengths  # a causal query never sees the padding to its right
        mixed, found = self.heads.attend_mapped(q, k, v, lengths, self.training, return_map)
        return self.out(mixed), found

    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        return self.heads.layout(dtype)

    def extend(self, x: Tensor, span: Span, state: MixerState) -> Tensor:
        q, k, v = self._project(x, span)
        keys, values = (state.append(name, self.heads.remembered(x), span) for name, x in (("keys", k), ("values", v)))
        if isinstance(span.start, int):  # the queries are aligned with the last keys
            mixed = self.heads.attend(q, keys, values, None, span.count > 1, self.training)
        else:
            end = span.start + (span.count if span.lengths is None else span.lengths)
            mixed = self.heads.attend(q, keys, values, end, span.count > 1, self.training, span.start)
        extended: Tensor = self.out(mixed)
        return extended


class CrossAttention(nn.Module):
    """Attention of the decoder over the encoder's output, without positions; `key_value` has the rows [k; v]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = _Heads(config, causal=False)
        self.query = Linear(config.d_model, self.heads.q_width, bias=config.bias)
        self.key_value = Linear(config.d_model, (self.heads.kv_width, self.heads.kv_width), bias=config.bias)
        self.out = Linear(config.d_model, config.d_model, bias=config.bias, residual_output=True)

    def state_layout(self, dtype: torch.dtype) -> StateLayout:
        """What is kept of a source's row, in a model of this dtype."""
        return self.heads.layout(dtype)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory [B, S, d] -> keys and values [B, Hkv, S, D]."""
        k, v = self.key_value(memory).chunk(2, dim=-1)
        return self.heads.split(k), self.heads.split(v)

    def remembered(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`keys_values` as decoding step by step reads them."""
        keys, values = self.keys_values(memory)
        return self.heads.remembered(keys), self.heads.remembered(values)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None, return_map: MapWish) -> tuple[Tensor, AttentionMap | None]:
        """x [B, T, d] over keys and values [B, Hkv, S, D], of which the first lengths [B] (None: all) are real -> [B, T, d]."""
        q = self.heads.split(self.query(x))
        mixed, found = self.heads.attend_mapped(q, keys, values, lengths, self.training, return_map)
        return self.out(mixed), found
