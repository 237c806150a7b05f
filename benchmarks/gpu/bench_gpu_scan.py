"""GPU rows of selective_scan and selective_state_update beside mamba-ssm. Run by contestants.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk import ops
from gpu.contestants import Row, peer


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    shapes = [(2, 32, 64)] if small else [(8, 2048, 2048), (1, 1024, 8192), (1, 256, 2048), (64, 512, 64)]
    for batch, dim, length in shapes:
        for which in ("fwd", "fwd+bwd"):
            yield _scan(device, batch, dim, length, 16, which)
    for batch, dim in ((2, 32),) if small else ((1, 2048), (64, 2048), (256, 4096)):
        yield _update(device, batch, dim, 16)


def _scan(device: torch.device, batch: int, dim: int, length: int, states: int, which: str) -> Row:
    backward = which != "fwd"
    u, delta, z = (torch.randn(batch, dim, length, device=device).bfloat16().requires_grad_(backward) for _ in range(3))
    A = (-torch.arange(1, states + 1, device=device).float().repeat(dim, 1)).requires_grad_(backward)
    B, C = (torch.randn(batch, 1, states, length, device=device).bfloat16().requires_grad_(backward) for _ in range(2))
    D = torch.randn(dim, device=device).requires_grad_(backward)
    leaves, grad = (u, delta, A, B, C, D, z), torch.randn(batch, dim, length, device=device).bfloat16()

    def step(out: Tensor) -> Any:
        return torch.autograd.grad(out, leaves, grad) if backward else out

    def mamba() -> Any:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return lambda: step(selective_scan_fn(u, delta, A, B, C, D, z, delta_softplus=True))

    elements = float(batch * dim * length)
    return Row(
        f"selective_scan {which}",
        f"B{batch} D{dim} L{length} N{states} bf16",
        lambda: step(ops.selective_scan(u, delta, A, B, C, D, z, delta_softplus=True)),
        {"mamba-ssm": peer("mamba-ssm", mamba)},
        traffic=elements * 2 * (4 if not backward else 12),
        targets=(("picoseconds", 24.0 if backward else 6.0), ("mamba-ssm", 1.3 if batch * dim < 132 * 8 else 1.0)),
        elements=elements,
        arguments=functools.partial(ops.explain, "selective_scan", u, delta, A, B, C, D, z, delta_softplus=True),
    )


def _update(device: torch.device, batch: int, dim: int, states: int) -> Row:
    state, A = torch.randn(batch, dim, states, device=device), -torch.arange(1, states + 1, device=device).float().repeat(dim, 1)
    x, dt = (torch.randn(batch, dim, device=device).bfloat16() for _ in range(2))
    B, C = (torch.randn(batch, states, device=device).bfloat16() for _ in range(2))
    D, other = torch.randn(dim, device=device), state.clone()

    def mamba() -> Any:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        return lambda: selective_state_update(other, x, dt, A, B, C, D, dt_softplus=True)

    def eager() -> Tensor:
        step = F.softplus(dt.float())
        other.mul_(torch.exp(step[..., None] * A)).add_((step * x)[..., None] * B[:, None])
        return torch.einsum("bdn,bn->bd", other, C.float()) + D * x

    return Row(
        "selective_state_update",
        f"B{batch} D{dim} N{states} bf16",
        lambda: ops.selective_state_update(state, x, dt, A, B, C, D, dt_softplus=True),
        {"eager": eager, "mamba-ssm": peer("mamba-ssm", mamba)},
        traffic=8.0 * state.numel(),
        targets=(("mamba-ssm", 1.0),),
        host=True,
        arguments=functools.partial(ops.explain, "selective_state_update", state, x, dt, A, B, C, D, dt_softplus=True),
    )
