"""Pre-norm blocks: x + dropout(sublayer(norm(x))), for the mixer, the cross-attention and the feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from cvmk.config.schema import ModelConfig
from cvmk.nn.cache import DecoderState
from cvmk.nn.linear import Linear
from cvmk.nn.mixers import CrossAttention, build_mixer
from cvmk.nn.outputs import AttentionMap
from cvmk.nn.positions import Rotation


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


class EncoderBlock(nn.Module):
    """Mixer, feed-forward."""

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.mixer_norm = make_norm(config)
        self.mixer = build_mixer(mixer, config, causal=False)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Tensor, rotation: Rotation | None, return_map: bool) -> tuple[Tensor, AttentionMap | None]:
        """x [B, S, d], of which the first lengths [B] positions are real -> [B, S, d]."""
        mixed, attention = self.mixer(self.mixer_norm(x), lengths, rotation, return_map)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.ffn(self.ffn_norm(x))), attention


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
        self, x: Tensor, memory: Tensor, lengths: Tensor, rotation: Rotation | None, return_map: bool
    ) -> tuple[Tensor, AttentionMap | None, AttentionMap | None]:
        """x [B, T, d] over memory [B, S, d], of which the first lengths [B] positions are real -> [B, T, d]."""
        mixed, attention = self.mixer(self.mixer_norm(x), None, rotation, return_map)
        x = x + self.dropout(mixed)
        keys, values = self.cross.keys_values(memory)
        mixed, cross = self.cross(self.cross_norm(x), keys, values, lengths, return_map)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.ffn(self.ffn_norm(x))), attention, cross

    def extend(self, x: Tensor, layer: int, state: DecoderState, rotation: Rotation | None) -> Tensor:
        """x [N, T, d], the positions from state.position on of N hypotheses, through this block, the layer-th -> [N, T, d].

        The hypotheses of a sentence are queries of one cross-attention, so nothing is copied for them.
        """
        x = x + self.dropout(self.mixer.extend(self.mixer_norm(x), state.mixers[layer], state.position, rotation))
        memory, width = state.memory, x.shape[-1]
        queries = self.cross_norm(x).view(memory.lengths.shape[0], state.copies * x.shape[1], width)
        mixed, _ = self.cross(queries, *memory.cross[layer], memory.lengths if memory.padded else None, False)
        x = x + self.dropout(mixed.view(x.shape))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))

