"""What the tests of the quantised linears on GPUs share."""

from __future__ import annotations

import torch

ACTIVATIONS = (None, "relu", "gelu", "silu", "swiglu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def check(got: torch.Tensor, peer: torch.Tensor, law: torch.Tensor, largest: float = 0.0) -> None:
    """Two baselines: at most twice the error of the reference in the same dtype, four ulps of the largest value where both are tiny.

    `law` is the result in float64 (or float32, where both are measured against that), `largest` the largest magnitude before the activation.
    """
    assert got.dtype == peer.dtype and got.shape == law.shape
    error, allowed = ((t.double() - law).abs().max().item() if t.numel() else 0.0 for t in (got, peer))
    assert error <= 2 * allowed + 4 * torch.finfo(got.dtype).eps * max(largest, law.abs().max().item() if law.numel() else 0.0), (error, allowed)
