"""selective_scan beside the plain loop over time in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from limits import cpu_limit
from torch import Tensor
from torch.nn import functional as F

from cvmk import ops


def eager(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The recurrence as written down (Gu & Dao 2023): one state update a step."""
    delta = F.softplus(delta)
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    added = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state, outputs = torch.zeros_like(added[:, :, 0]), []
    for step in range(u.shape[2]):
        state = decay[:, :, step] * state + added[:, :, step]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, step]))
    return torch.stack(outputs, 2) + u * D[:, None]


@pytest.mark.parametrize("shape", [(1, 512, 512, 16), (32, 256, 32, 16)], ids=["B1 D512 L512 N16", "B32 D256 L32 N16"])
@pytest.mark.parametrize("which", ["fwd", "fwd+bwd"])
def test_cpu_selective_scan(compare: Callable[..., Any], shape: tuple[int, int, int, int], which: str) -> None:
    batch, dim, length, state = shape
    u, delta = torch.randn(batch, dim, length), torch.rand(batch, dim, length) * 0.1 - 2
    A = -torch.arange(1, state + 1).float().repeat(dim, 1)
    B, C, D = torch.randn(batch, state, length), torch.randn(batch, state, length), torch.randn(dim)
    inputs = (u, delta, A, B, C, D)
    grad = torch.randn(batch, dim, length)
    for tensor in inputs:
        tensor.requires_grad_(which != "fwd")

    def run(function: Callable[..., Any]) -> None:
        out = function()
        if which != "fwd":
            torch.autograd.grad(out, inputs, grad)

    elements = batch * dim * length
    compare(
        lambda: run(lambda: ops.selective_scan(u, delta, A, B, C, D, delta_softplus=True)),
        {"eager loop": lambda: run(lambda: eager(*inputs))},
        case=f"selective_scan {which} fp32 B{batch} D{dim} L{length} N{state}",
        limit=cpu_limit(operations=elements * state * (20 if which == "fwd" else 60), traffic=elements * 4 * (3 if which == "fwd" else 8)),
    )
