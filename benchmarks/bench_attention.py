"""flash_attention beside PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from limits import cpu_limit
from torch.nn.functional import scaled_dot_product_attention

from cvmk import ops

SHAPES = {  # batch, heads, length, head size, causal
    "B8 H8 T512 D64 causal": (8, 8, 512, 64, True),
    "B1 H8 T4096 D64 causal": (1, 8, 4096, 64, True),
    "B2 H8 T2048 D128": (2, 8, 2048, 128, False),
    "B32 H4 T32 D32 lengths": (32, 4, 32, 32, False),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("which", ["fwd", "fwd+bwd"])
def test_cpu_attention(compare: Callable[..., Any], name: str, dtype: torch.dtype, which: str) -> None:
    batch, heads, length, size, causal = SHAPES[name]
    q, k, v = (torch.randn(batch, heads, length, size, dtype=dtype, requires_grad=which != "fwd") for _ in range(3))
    lengths = torch.randint(length // 2, length + 1, (batch,)) if "lengths" in name else None
    mask = (torch.arange(length) < lengths[:, None])[:, None, None, :] if lengths is not None else None
    grad = torch.randn(batch, heads, length, size, dtype=dtype)

    def ours() -> torch.Tensor:
        return ops.flash_attention(q, k, v, causal=causal, key_lengths=lengths)

    def peer() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    operations = 4 * batch * heads * length * length * size * (0.5 if causal else 1.0) * (1 if which == "fwd" else 3.5)
    limit = cpu_limit(operations=operations, dtype=dtype)
    peers = {"SDPA": peer if which == "fwd" else lambda: peer().backward(grad)}
    if mask is not None:  # the peer at its best: without the mask it computes something else, faster
        peers["SDPA, no mask"] = lambda: _run(scaled_dot_product_attention(q, k, v), grad, which)
    compare(lambda: _run(ours(), grad, which), peers, case=f"attention {which} {_name(dtype)} {name}", limit=limit)


@pytest.mark.parametrize("length", [4096, 32768])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_cpu_decode(compare: Callable[..., Any], length: int, dtype: torch.dtype) -> None:
    """One query over a long cache: bound by reading it."""
    q = torch.randn(1, 8, 1, 64, dtype=dtype)
    k, v = (torch.randn(1, 8, length, 64, dtype=dtype) for _ in range(2))
    limit = cpu_limit(traffic=2.0 * k.numel() * k.element_size())
    peers = {"SDPA": lambda: scaled_dot_product_attention(q, k, v)}
    compare(lambda: ops.flash_attention(q, k, v), peers, case=f"attention decode {_name(dtype)} H8 T{length} D64", limit=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_cpu_distill(compare: Callable[..., Any], dtype: torch.dtype) -> None:
    """Attention and its distance from a teacher's maps, forward and backward, beside the maps stored by plain PyTorch."""
    batch, heads, length, size = 8, 8, 512, 64
    q, k, v = (torch.randn(batch, heads, length, size, dtype=dtype, requires_grad=True) for _ in range(3))
    teacher_q, teacher_k = (torch.randn(batch, heads, length, size, dtype=dtype) for _ in range(2))
    grad = torch.randn(batch, heads, length, size, dtype=dtype)

    def ours() -> None:
        out, kl = ops.flash_attention_distill(q, k, v, teacher_q, teacher_k)
        torch.autograd.backward([out, kl.sum()], [grad, None])

    def peer() -> None:
        s, t = ((a @ b.transpose(-1, -2) * size**-0.5).float().log_softmax(-1) for a, b in ((q, k), (teacher_q, teacher_k)))
        out = s.exp().to(dtype) @ v
        torch.autograd.backward([out, torch.nn.functional.kl_div(s, t, reduction="sum", log_target=True)], [grad, None])

    limit = cpu_limit(operations=9 * 2.0 * batch * heads * length * length * size, dtype=dtype)
    compare(ours, {"maps stored": peer}, case=f"attention distill fwd+bwd {_name(dtype)} B8 H8 T512 D64", limit=limit)


def _run(out: torch.Tensor, grad: torch.Tensor, which: str) -> None:
    if which != "fwd":
        out.backward(grad)


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"
