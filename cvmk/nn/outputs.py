"""What a forward pass hands out besides logits, for distillation and for looking inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Unprojected(NamedTuple):
    """Logits that nobody has made: what the output layer reads, and its matrix, so that a loss can be computed without them (`ops.linear_kd_loss`)."""

    features: Tensor
    """[B, T, d]"""
    matrix: Tensor
    """[V, d]"""

    def logits(self) -> Tensor:
        """[B, T, V]"""
        return F.linear(self.features, self.matrix)


@dataclass(frozen=True)
class AttentionMap:
    """One attention of one block, kept as its queries and keys so that no [Tq, Tk] map is stored.

    q [B, H, Tq, D] and k [B, Hkv, Tk, D] stand after rotary positions; query head h reads key head h // (H / Hkv).
    key_lengths [B] counts the keys of each row that are real, None where all are. Queries on padding are not marked.
    divergence [B, H, Tq] is that from the map of a teacher, as `ops.attention_kl` gives it, where it was asked for while attending.
    """

    q: Tensor
    k: Tensor
    scale: float
    causal: bool
    key_lengths: Tensor | None
    divergence: Tensor | None = None

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


MapWish = bool | AttentionMap
"""What an attention is asked for besides its result: nothing, its map, or its map with the divergence from a teacher's."""

AttentionKind = Literal["encoder", "decoder", "cross"]


@dataclass
class HiddenStates:
    """The residual stream after each block: encoder [B, S, d], decoder [B, T, d]."""

    encoder: list[Tensor] = field(default_factory=list)
    decoder: list[Tensor] = field(default_factory=list)


@dataclass
class AttentionMaps:
    """The attentions of each block whose mixer is attention: encoder self, decoder self, cross.

    `imitated` are a teacher's maps, by kind and place in these lists, that those of a student are compared with while it attends.
    """

    encoder: list[AttentionMap] = field(default_factory=list)
    decoder: list[AttentionMap] = field(default_factory=list)
    cross: list[AttentionMap] = field(default_factory=list)
    imitated: Mapping[tuple[str, int], AttentionMap] = field(default_factory=dict)

    def wish(self, kind: AttentionKind) -> MapWish:
        """What the next attention of the kind is asked for."""
        found: list[AttentionMap] = getattr(self, kind)
        return self.imitated.get((kind, len(found)), True)
