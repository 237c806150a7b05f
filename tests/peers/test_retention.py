"""Retention against the lightning attention of Hugging Face's MiniMax, a retention whose decays are other numbers, in blocks and by its cache.

Transformers has no RetNet; this layer is the same recurrence without the turning of queries and keys, and with another norm and gate.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cvmk.nn.mixers.retnet import remembered, retention

minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")


@pytest.mark.parametrize("count", [1, 7, 150])
def test_it_is_lightning_attention(count: int) -> None:
    torch.manual_seed(0)
    config = minimax.MiniMaxConfig(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=3, head_dim=8, num_hidden_layers=2, block_size=16, layer_types=["linear_attention"] * 2
    )
    layer = minimax.MiniMaxLightningAttention(config, 0).double()
    layer.norm = torch.nn.Identity()  # it computes in float32, and so do the decays before they are made anew
    layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)
    x = torch.randn(2, count, 24, dtype=torch.float64, requires_grad=True)
    expected, state = layer(x, None, None)
    q, k, v = (F.silu(layer.qkv_proj(x)).unflatten(-1, (3, 24))[..., part * 8 : part * 8 + 8].transpose(1, 2) for part in range(3))
    decay = -layer.slope_rate.flatten()
    mixed = retention(q, k, v, decay).transpose(1, 2).flatten(2)
    found = layer.out_proj(torch.sigmoid(layer.output_gate(x)) * mixed)
    tolerance = {"atol": 1e-12, "rtol": 1e-10}
    torch.testing.assert_close(found, expected, **tolerance)
    seed = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, seed)[0], torch.autograd.grad(expected, x, seed)[0], **tolerance)
    if count % 16 == 0 or count < 16:  # in a last block that is not full, its state is not decayed to the end
        torch.testing.assert_close(remembered(k, v, decay, None, None), state, **tolerance)
