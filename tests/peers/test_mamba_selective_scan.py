"""The cases of mamba's tests/ops/test_selective_scan.py (github.com/state-spaces/mamba) as tests of our op: its grid of shapes and options.

Batch 2, 4 channels, 8 states, lengths 128 to 4096, B and C constant or varying in 1 or 2 groups, with D, z, delta_bias, softplus and the last
state; A = -rand / 2, delta = rand / 2. mamba compares its kernel with a loop in float32 within (rtol, atol) of 6e-4 / 2e-3 in float32, 3e-3 / 5e-3
in half precision and 3e-2 / 5e-2 in bfloat16, gradients more loosely (du twice, ddelta 5 and 10 times, weights 1e-3 and A five times that).
Here the loop runs in float64 and the float32 tolerances are a hundredth of those, except that float32's own error grows with the length.
Complex A is not supported, so its cases stay out; the last state has a gradient here, which mamba's kernel has not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cvmk.ops import selective_scan

TOLERANCES = {torch.float32: (6e-6, 2e-5), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)}
"""Relative and absolute; of half precision a rounding of the output and the half of mamba's absolute tolerance."""


def loop(a: dict[str, Tensor], softplus: bool) -> tuple[Tensor, Tensor]:
    """The recurrence in float64, one step after the other."""
    u, delta, A = a["u"], a["delta"], a["A"]
    if "delta_bias" in a:
        delta = delta + a["delta_bias"][:, None]
    if softplus:
        delta = F.softplus(delta)
    dim = u.shape[1]

    def of_channels(weights: Tensor) -> Tensor:
        """[batch or 1, dim, state, length or 1]."""
        return weights[None, :, :, None] if weights.dim() == 2 else weights.repeat_interleave(dim // weights.shape[1], 1)

    B, C = of_channels(a["B"]), of_channels(a["C"])
    decay = torch.exp(delta.unsqueeze(2) * A[:, :, None])
    drive = (delta * u).unsqueeze(2) * B
    state, ys = torch.zeros_like(drive[..., 0]), []
    for t in range(u.shape[2]):
        state = decay[..., t] * state + drive[..., t]
        ys.append((state * C[..., min(t, C.shape[-1] - 1)]).sum(-1))
    y = torch.stack(ys, -1)
    if "D" in a:
        y = y + u * a["D"][:, None]
    return (y * F.silu(a["z"]) if "z" in a else y), state


def case(length: int, varying_B: bool, varying_C: bool, groups: int, optional: str, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    batch, dim, states = 2, 4, 8
    shape = (batch, groups, states, length)
    made = {
        "A": -0.5 * torch.rand(dim, states),
        "B": torch.randn(shape, dtype=dtype) if varying_B else torch.randn(dim, states),
        "C": torch.randn(shape, dtype=dtype) if varying_C else torch.randn(dim, states),
        "u": torch.randn(batch, dim, length, dtype=dtype),
        "delta": (0.5 * torch.rand(batch, dim, length)).to(dtype),
    }
    more = {"D": torch.randn(dim), "z": torch.randn(batch, dim, length, dtype=dtype), "delta_bias": 0.5 * torch.rand(dim)}
    return made | {name: more[name] for name in optional.split()}


def check(a: dict[str, Tensor], softplus: bool, last: bool) -> None:
    dtype, length = a["u"].dtype, a["u"].shape[2]
    rtol, atol = TOLERANCES[dtype]
    ours = {name: t.clone().requires_grad_() for name, t in a.items()}
    exact = {name: t.double().requires_grad_() for name, t in a.items()}
    scan: Any = selective_scan
    found, law = scan(**ours, delta_softplus=softplus, return_last_state=True), loop(exact, softplus)
    torch.testing.assert_close(found[0].double(), law[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(found[1].double(), law[1], rtol=1e-5, atol=1e-5)
    grads = [torch.randn_like(o) for o in found]
    count = 2 if last else 1
    gradients = torch.autograd.grad(found[:count], list(ours.values()), grads[:count])
    wanted = torch.autograd.grad(law[:count], list(exact.values()), [g.double() for g in grads[:count]])
    for name, gradient, want in zip(a, gradients, wanted, strict=True):
        # Sums over all steps are of the size of their largest terms; mamba's absolute tolerances mean numbers near 1.
        scale = max(1.0, want.abs().max().item())
        over_time = 1e-5 if dtype == torch.float32 or gradient.dtype == torch.float32 else atol
        limit = (over_time if gradient.dtype == torch.float32 else 2 * atol) * scale * (1 if length < 1024 else 2)
        torch.testing.assert_close(gradient.double(), want, rtol=2 * rtol, atol=limit, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [128, 256, 512, 1024, 2048])
def test_lengths_with_everything(length: int, dtype: torch.dtype) -> None:
    check(case(length, True, True, 1, "D z delta_bias", dtype), softplus=True, last=True)


@pytest.mark.exhaustive
def test_the_longest() -> None:
    check(case(4096, True, True, 2, "D z delta_bias", torch.float32), softplus=True, last=True)


@pytest.mark.parametrize("optional", ["", "D", "z", "delta_bias", "D z delta_bias"])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_options(optional: str, softplus: bool, last: bool) -> None:
    check(case(128, True, True, 2, optional, torch.float32), softplus, last)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("varying_C", [False, True])
@pytest.mark.parametrize("varying_B", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_and_varying_weights(varying_B: bool, varying_C: bool, groups: int, dtype: torch.dtype) -> None:
    check(case(256, varying_B, varying_C, groups, "D z delta_bias", dtype), softplus=True, last=True)
