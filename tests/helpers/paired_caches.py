"""Attention as the native engine computes it where activations are quantised, slowly."""

from __future__ import annotations

from typing import Any

import torch


def attention_of_pairs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, key_lengths: Any, query_start: Any = None, scale: float, dropout_p: float
) -> torch.Tensor:
    """Of caches in bfloat16: q, keys, values and the weights before their division by the sum are rounded to it."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.bfloat16().float() for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    queries, keys = q.shape[2], k.shape[2]
    positions = torch.arange(keys)
    start = torch.tensor([keys - queries]) if query_start is None else query_start
    filled = positions < (torch.tensor([keys]) if key_lengths is None else key_lengths)[:, None]
    v = v.masked_fill(~filled[:, None, :, None], 0.0)  # nobody has written there, and 0 times what is there may be NaN
    seen = filled[:, None, None]
    if causal:
        seen = seen & (positions <= (start[:, None] + torch.arange(queries))[..., None])[:, None]
    scores = (q @ k.transpose(-1, -2)).masked_fill(~seen, -torch.inf)
    weights = ((scores - scores.amax(-1, keepdim=True)) * scale).exp()
    return weights.bfloat16().float() @ v / weights.sum(-1, keepdim=True)
