"""embed beside PyTorch's embedding, scale, positions and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from limits import cpu_limit
from torch import Tensor
from torch.nn import functional as F

from cvmk import ops


@pytest.mark.parametrize(("sentences", "n"), [(120, 128), (120, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cpu_embed(compare: Callable[..., Any], sentences: int, n: int, dtype: torch.dtype) -> None:
    ids, scale = torch.randint(8000, (sentences, 17)), n**0.5
    weight, positions = torch.randn(8000, n, dtype=dtype, requires_grad=True), torch.randn(17, n, dtype=dtype)
    grad = torch.randn(sentences, 17, n, dtype=dtype)

    def step(function: Callable[[], Tensor]) -> None:
        torch.autograd.grad(function(), weight, grad)

    compare(
        lambda: step(lambda: ops.embed(ids, weight, positions, scale=scale, dropout_p=0.1)),
        {"eager": lambda: step(lambda: F.dropout(F.embedding(ids, weight) * scale + positions, 0.1))},
        case=f"embed fwd+bwd {sentences}x17 of 8000x{n} {'bf16' if dtype == torch.bfloat16 else 'fp32'} dropout 0.1",
        limit=cpu_limit(traffic=(3 * grad.numel() + weight.numel()) * weight.element_size()),
    )
