"""What a call of each op costs the host: tiny shapes, where nothing else counts. Run by contestants.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from cvmk import ops
from gpu.contestants import Row

HOST = 10e-6
"""Seconds of the host's time that a forward call may take."""


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).bfloat16()

    def row(op: str, *arguments: Any, peers: dict[str, Any] | None = None, **options: Any) -> Row:
        call = functools.partial(getattr(ops, op), *arguments, **options)
        explain = functools.partial(ops.explain, op, *arguments, **options)
        return Row(f"{op} host", "tiny", call, peers or {}, targets=(("host", HOST),), host=True, arguments=explain)

    with torch.no_grad():
        q, k, v = (normal(4, 4, 32, 32) for _ in range(3))
        yield row("flash_attention", q, k, v, peers={"SDPA": lambda: F.scaled_dot_product_attention(q, k, v)})
        yield row("flash_attention", q, k, v, key_lengths=torch.full((4,), 20, device=device), causal=False)
        yield row("flash_attention_distill", q, k, v, q, k)
        yield row("attention_kl", q, k, q, k)
        u, delta, states = normal(2, 64, 32), normal(2, 64, 32), -torch.rand(64, 16, device=device)
        yield row("selective_scan", u, delta, states, normal(2, 16, 32), normal(2, 16, 32), delta_softplus=True)
        state, x = torch.zeros(2, 64, 16, device=device), normal(2, 64)
        yield row("selective_state_update", state, x, x, states, normal(2, 16), normal(2, 16), dt_softplus=True)
        y, weight = normal(4, 256), torch.randn(256, 256, device=device)
        dense = weight.bfloat16()
        yield row("int8_linear", y, ops.quantize_int8(weight), peers={"F.linear bf16": lambda: F.linear(y, dense)})
        yield row("int4_linear", y, ops.quantize_int4(weight, 64), peers={"F.linear bf16": lambda: F.linear(y, dense)})
        logits, target = normal(8, 512), torch.zeros(8, dtype=torch.int64, device=device)
        yield row("kd_loss", logits, normal(8, 512), target, peers={"cross_entropy": lambda: F.cross_entropy(logits, target)})
        hidden = normal(8, 64)
        yield row("linear_kd_loss", hidden, normal(512, 64), hidden, normal(512, 64), target)
