"""selective_scan and selective_state_update beside plain PyTorch: the loop over time, and the step written down.

The limit of a scan is the issue rate of vector instructions (two multiply-adds of 16 lanes a cycle, CVMK_LIMIT_TFLOPS_FP32): a state and
step takes 13 in the forward pass (10 for 2^x, 3 for the recurrence and the output) and 20 more in the backward pass (the decay again, 2 for
the state, 8 for the adjoint). What is done once for all states of a channel (softplus, gate, transpositions) comes on top and is not
counted. A single step is bound by memory: the state is read and written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from limits import cpu_limit
from torch import Tensor
from torch.nn import functional as F

from cvmk import ops

INSTRUCTIONS = {"fwd": 13, "fwd+bwd": 33}
SHAPES = [(1, 512, 512, 16), (32, 256, 32, 16), (4, 64, 1024, 16)]


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


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "B{} D{} L{} N{}".format(*shape))
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
        limit=cpu_limit(operations=2 * elements * state * INSTRUCTIONS[which], traffic=elements * 4 * (3 if which == "fwd" else 8)),
    )


def eager_step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    dt = F.softplus(dt)
    state.mul_(torch.exp(dt[..., None] * A)).add_((dt * x)[..., None] * B[:, None])
    return torch.einsum("bdn,bn->bd", state, C) + D * x


@pytest.mark.parametrize("shape", [(1, 512, 16), (64, 2048, 16), (16, 2048, 64)], ids=lambda shape: "B{} D{} N{}".format(*shape))
def test_cpu_selective_state_update(compare: Callable[..., Any], shape: tuple[int, int, int]) -> None:
    batch, dim, states = shape
    state, x, dt = torch.randn(batch, dim, states), torch.randn(batch, dim), torch.randn(batch, dim) - 2
    A = -torch.arange(1, states + 1).float().repeat(dim, 1)
    B, C, D = torch.randn(batch, states), torch.randn(batch, states), torch.randn(dim)
    other = state.clone()
    compare(
        lambda: ops.selective_state_update(state, x, dt, A, B, C, D, dt_softplus=True),
        {"eager step": lambda: eager_step(other, x, dt, A, B, C, D)},
        case=f"selective_state_update fp32 B{batch} D{dim} N{states}",
        limit=cpu_limit(operations=2 * state.numel() * 14, traffic=state.numel() * 8),
    )
