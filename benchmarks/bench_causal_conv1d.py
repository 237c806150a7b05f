"""causal_conv1d beside PyTorch's grouped convolution with the SiLU behind it, as Hugging Face's Mamba calls it; and its step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from limits import cpu_limit
from torch import Tensor
from torch.nn import functional as F

from cvmk import ops

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.conv1d(x, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=x.shape[1])[..., : x.shape[2]])


@pytest.mark.parametrize(("batch", "dim", "length"), [(32, 512, 32), (1, 1536, 1024)])
@dtypes
def test_cpu_causal_conv1d(compare: Callable[..., Any], batch: int, dim: int, length: int, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((batch, dim, length), (dim, 4), (dim,)))
    grad = torch.randn(batch, dim, length, dtype=dtype)
    name = "bf16" if dtype == torch.bfloat16 else "fp32"

    def ours() -> Any:
        return ops.causal_conv1d(x, weight, bias, activation="silu")

    def step(function: Callable[[], Tensor]) -> None:
        torch.autograd.grad(function(), (x, weight, bias), grad)

    def infer(function: Callable[[], Tensor]) -> None:
        with torch.inference_mode():
            function()

    case, traffic = f"causal_conv1d {batch}x{dim}x{length} width 4 silu {name}", x.numel() * x.element_size()
    compare(lambda: infer(ours), {"eager": lambda: infer(lambda: eager(x, weight, bias))}, case=case, limit=cpu_limit(traffic=2 * traffic))
    compare(lambda: step(ours), {"eager": lambda: step(lambda: eager(x, weight, bias))}, case=f"{case} fwd+bwd", limit=cpu_limit(traffic=5 * traffic))


@dtypes
def test_cpu_causal_conv1d_update(compare: Callable[..., Any], dtype: torch.dtype) -> None:
    state, x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((8, 512, 3), (8, 512), (512, 4), (512,)))

    def eager_step() -> Tensor:
        joined = torch.cat((state, x.unsqueeze(2)), dim=2)
        state.copy_(joined[..., 1:])
        return F.silu((joined * weight).sum(2) + bias)

    compare(
        lambda: ops.causal_conv1d_update(state, x, weight, bias, activation="silu"),
        {"eager": eager_step},
        case=f"causal_conv1d_update 8x512 width 4 silu {'bf16' if dtype == torch.bfloat16 else 'fp32'}",
        limit=cpu_limit(traffic=(2 * state.numel() + 2 * x.numel()) * x.element_size()),
    )
