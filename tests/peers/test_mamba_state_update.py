"""The cases of mamba's tests/ops/triton/test_selective_state_update.py (github.com/state-spaces/mamba) as tests of our op.

2048, 2064 and 4096 channels, 16, 32 and 64 states, with and without z; with heads of 64 channels, 1, 2 and 4 groups, and one A a head or one an
element. mamba compares its kernel with its loop within (rtol, atol) of 3e-4 / 1e-3 in float32, 5e-3 / 1e-2 in half precision and 1e-2 / 5e-2 in
bfloat16. Here the law is computed in float64, float32 has a hundredth of those tolerances, the others a rounding of the output.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cvmk.ops import selective_state_update

TOLERANCES = {torch.float32: (3e-6, 1e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (8e-3, 1e-2)}


def law(a: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """y and the new state in float64; without heads every channel is a head of one."""
    a = {name: t.double() for name, t in a.items()}
    if a["x"].dim() == 2:
        a = {name: t if name in ("B", "C") else t.unsqueeze(-2 if name in ("state", "A") else -1) for name, t in a.items()}
    B, C = (a[name].unsqueeze(1) if a[name].dim() == 2 else a[name] for name in "BC")
    heads = a["state"].shape[1]
    B, C = (t.repeat_interleave(heads // t.shape[1], 1).unsqueeze(2) for t in (B, C))
    step = F.softplus(a["dt"] + a["dt_bias"]).unsqueeze(-1)
    state = torch.exp(step * a["A"]) * a["state"] + step * a["x"].unsqueeze(-1) * B
    y = (state * C).sum(-1) + a["D"] * a["x"]
    return (y * F.silu(a["z"]) if "z" in a else y), state


def check(a: dict[str, Tensor]) -> None:
    want_y, want_state = law(a)
    rtol, atol = TOLERANCES[a["x"].dtype]
    y = selective_state_update(**a, dt_softplus=True)
    assert y.dtype == a["x"].dtype and y.shape == a["x"].shape
    torch.testing.assert_close(a["state"].double(), want_state.view_as(a["state"]), rtol=rtol, atol=atol)
    torch.testing.assert_close(y.double(), want_y.view_as(y), rtol=rtol, atol=atol * (1 if a["x"].dtype == torch.float32 else 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_z", [False, True])
@pytest.mark.parametrize("states", [16, 32, 64])
@pytest.mark.parametrize("dim", [2048, 2064, 4096])
def test_channels(dim: int, states: int, has_z: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = 2
    a = {
        "state": torch.randn(batch, dim, states, dtype=dtype),
        "x": torch.randn(batch, dim, dtype=dtype),
        "dt": torch.randn(batch, dim, dtype=dtype),
        "dt_bias": torch.rand(dim) - 4.0,
        "A": -torch.rand(dim, states) - 1.0,
        "B": torch.randn(batch, states),
        "C": torch.randn(batch, states),
        "D": torch.randn(dim),
    }
    if has_z:
        a["z"] = torch.randn(batch, dim, dtype=dtype)
    check(a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("has_z", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dim,states", [(2048, 16), (4096, 32), (2048, 64)])
def test_heads(dim: int, states: int, groups: int, has_z: bool, tied: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, width = 2, 64
    heads = dim // width
    a = {
        "state": torch.randn(batch, heads, width, states, dtype=dtype),
        "x": torch.randn(batch, heads, width, dtype=dtype),
        "B": torch.randn(batch, groups, states),
        "C": torch.randn(batch, groups, states),
    }
    if tied:
        a["dt"] = torch.randn(batch, heads, 1, dtype=dtype).expand(batch, heads, width)
        a["dt_bias"] = (torch.rand(heads, 1) - 4.0).expand(heads, width)
        a["A"] = (-torch.rand(heads, 1, 1) - 1.0).expand(heads, width, states)
        a["D"] = torch.randn(heads, 1).expand(heads, width)
    else:
        a["dt"] = torch.randn(batch, heads, width, dtype=dtype)
        a["dt_bias"] = torch.rand(heads, width) - 4.0
        a["A"] = -torch.rand(heads, width, states) - 1.0
        a["D"] = torch.randn(heads, width)
    if has_z:
        a["z"] = torch.randn_like(a["x"])
    check(a)
