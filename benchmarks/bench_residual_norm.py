"""residual_norm beside PyTorch's dropout, sum and norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from limits import cpu_limit
from torch import Tensor
from torch.nn import functional as F

from cvmk import ops

DTYPES = {"fp32": (torch.float32,) * 3, "autocast": (torch.float32, torch.bfloat16, torch.bfloat16), "bf16": (torch.bfloat16,) * 3}
"""Dtypes of x, branch and the norm."""


@pytest.mark.parametrize(("rows", "n"), [(120 * 17, 128), (2048, 512)])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.0])
def test_cpu_residual_norm(compare: Callable[..., Any], rows: int, n: int, dtypes: str, p: float) -> None:
    x, branch = (torch.randn(rows, n, dtype=dtype, requires_grad=True) for dtype in DTYPES[dtypes][:2])
    weight, bias = torch.ones(n, requires_grad=True), torch.zeros(n, requires_grad=True)
    leaves = x, branch, weight, bias
    grads = torch.randn(rows, n, dtype=DTYPES[dtypes][0]), torch.randn(rows, n, dtype=DTYPES[dtypes][2])

    def eager() -> tuple[Tensor, Tensor]:
        s = x + F.dropout(branch, p, True)
        return s, F.layer_norm(s, (n,), weight, bias).to(grads[1].dtype)

    def ours() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtypes == "autocast"):
            return ops.residual_norm(x, branch, weight, bias, dropout_p=p)

    def step(function: Callable[[], tuple[Tensor, Tensor]]) -> None:
        torch.autograd.grad(function(), leaves, grads)

    # Forwards x and branch in, sum and norm out; backwards sum and two gradients in, two out.
    wide, branched, normed = (dtype.itemsize for dtype in DTYPES[dtypes])
    compare(
        lambda: step(ours),
        {"eager": lambda: step(eager)},
        case=f"residual_norm fwd+bwd {rows}x{n} {dtypes} dropout {p}",
        limit=cpu_limit(traffic=rows * n * (5 * wide + 2 * branched + 2 * normed)),
    )
