"""What a forward pass hands out besides logits, for distillation and for looking inside."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMap:
    """One attention of one block, kept as its queries and keys so that no [Tq, Tk] map is stored.

    q [B, H, Tq, D] and k [B, Hkv, Tk, D] stand after rotary positions; query head h reads key head h // (H / Hkv).
    key_lengths [B] counts the keys of each row that are real, None where all are. Queries on padding are not marked.
    """

    q: Tensor
    k: Tensor
    scale: float
    causal: bool
    key_lengths: Tensor | None

    def probabilities(self) -> Tensor:
        """The attention weights [B, H, Tq, Tk]: rows sum to 1, or are 0 where there is no key to attend to."""
        q, k = self.q, self.k
        if q.dtype in (torch.bfloat16, torch.float16):
            q, k = q.float(), k.float()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.transpose(-1, -2) * self.scale
        queries, keys = scores.shape[-2:]
        hidden = torch.zeros(scores.shape[0], 1, queries, keys, dtype=torch.bool, device=scores.device)
        if self.causal:
            hidden = hidden | torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
        if self.key_lengths is not None:
            hidden = hidden | (torch.arange(keys, device=scores.device) >= self.key_lengths.view(-1, 1, 1, 1))
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        return weights.masked_fill(hidden, 0.0)


@dataclass
class HiddenStates:
    """The residual stream after each block: encoder [B, S, d], decoder [B, T, d]."""

    encoder: list[Tensor] = field(default_factory=list)
    decoder: list[Tensor] = field(default_factory=list)


@dataclass
class AttentionMaps:
    """The attentions of each block whose mixer is attention: encoder self, decoder self, cross."""

    encoder: list[AttentionMap] = field(default_factory=list)
    decoder: list[AttentionMap] = field(default_factory=list)
    cross: list[AttentionMap] = field(default_factory=list)
