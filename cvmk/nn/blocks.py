"""Pre-norm blocks: mixer, cross-attention and feed-forward layer, each x + dropout(sublayer(norm(x))).

A block is given the residual stream and its norm for the first sublayer, and the norm that follows it; it gives both for the next
block. `residual` does what stands between two sublayers.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from cvmk.config.schema import ModelConfig
from cvmk.nn.linear import Linear
from cvmk.nn.mixers import CrossAttention, Mixer, build_mixer
from cvmk.nn.outputs import AttentionMap, MapWish
from cvmk.nn.positions import Span
from cvmk.nn.residual import residual
from cvmk.nn.state import MixerState


def make_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm with scale and shift, or RMSNorm with scale (Zhang & Sennrich 2019)."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps)


class FeedForward(nn.Module):
    """outer(activation(inner(x))); for swiglu `inner` has the rows [gate; up]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        widths = (config.ffn, config.ffn) if config.activation == "swiglu" else (config.ffn,)
        self.inner = Linear(config.d_model, widths, bias=config.bias)
        self.outer = Linear(config.ffn, config.d_model, bias=config.bias, residual_output=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        mixed: Tensor = self.outer(self.inner(x, self.activation))
        return mixed


def _mix(mixer: Mixer, normed: Tensor, span: Span, state: MixerState | None, return_map: MapWish) -> tuple[Tensor, AttentionMap | None]:
    """Whole sequences without a state; with one, the positions that come next."""
    if state is not None:
        return mixer.extend(normed, span, state), None
    mixed: tuple[Tensor, AttentionMap | None] = mixer(normed, span, return_map)
    return mixed


class EncoderBlock(nn.Module):
    """Mixer, feed-forward."""

    def __init__(self, config: ModelConfig, mixer: str, causal: bool) -> None:
        super().__init__()
        self.mixer_norm = make_norm(config)
        self.mixer = build_mixer(mixer, config, causal)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, normed: Tensor, following: nn.Module, span: Span, state: MixerState | None, return_map: MapWish
    ) -> tuple[Tensor, Tensor, AttentionMap | None]:
        """x [B, T, d] and mixer_norm(x) -> the residual stream behind the block, `following` of it, and the mixer's map."""
        mixed, own = _mix(self.mixer, normed, span, state, return_map)
        x, normed = residual(x, mixed, self.dropout, self.ffn_norm)
        x, normed = residual(x, self.ffn(normed), self.dropout, following)
        return x, normed, own


class Source(NamedTuple):
    """What a decoder block reads of B encoded sentences: keys and values [B, Hkv, S, D], of which the first lengths [B] (None: all) are real."""

    keys: Tensor
    values: Tensor
    lengths: Tensor | None


class DecoderBlock(nn.Module):
    """Causal mixer, cross-attention, feed-forward."""

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.mixer_norm = make_norm(config)
        self.mixer = build_mixer(mixer, config, causal=True)
        self.cross_norm = make_norm(config)
        self.cross = CrossAttention(config)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        following: nn.Module,
        span: Span,
        source: Source,
        state: MixerState | None,
        return_map: MapWish,
        return_cross: MapWish,
    ) -> tuple[Tensor, Tensor, AttentionMap | None, AttentionMap | None]:
        """x [N, T, d] and mixer_norm(x) -> the residual stream behind the block, `following` of it, and the maps of mixer and cross-attention.

        N is a multiple of the source's B: rows of one sentence stand together, and are queries of one cross-attention, so that nothing
        is copied for them.
        """
        mixed, own = _mix(self.mixer, normed, span, state, return_map)
        x, normed = residual(x, mixed, self.dropout, self.cross_norm)
        rows, sentences = normed.shape[0], source.keys.shape[0]
        if rows != sentences:
            normed = normed.view(sentences, rows // sentences * normed.shape[1], normed.shape[2])
        mixed, cross = self.cross(normed, source.keys, source.values, source.lengths, return_cross)
        x, normed = residual(x, mixed if rows == sentences else mixed.view(x.shape), self.dropout, self.ffn_norm)
        x, normed = residual(x, self.ffn(normed), self.dropout, following)
        return x, normed, own, cross
