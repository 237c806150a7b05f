"""kd_loss and linear_kd_loss beside the losses of PyTorch put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from limits import cpu_limit
from torch import Tensor
from torch.nn import functional as F

from cvmk import ops

ROWS = 2048


def eager(student: Tensor, teacher: Tensor, target: Tensor, temperature: float, alpha: float) -> Tensor:
    divergence = F.kl_div(
        F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1), log_target=True, reduction="batchmean"
    )
    return alpha * temperature**2 * divergence + (1 - alpha) * F.cross_entropy(student, target)


@pytest.mark.parametrize("vocabulary", [8000, 32000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cpu_kd_loss(compare: Callable[..., Any], vocabulary: int, dtype: torch.dtype) -> None:
    student = torch.randn(ROWS, vocabulary, dtype=dtype, requires_grad=True)
    teacher = torch.randn(ROWS, vocabulary, dtype=dtype)
    target = torch.randint(vocabulary, (ROWS,))

    def step(loss: Callable[..., Tensor]) -> None:
        student.grad = None
        loss().backward()

    compare(
        lambda: step(lambda: ops.kd_loss(student, teacher, target, temperature=2.0, alpha=0.5)),
        {"eager": lambda: step(lambda: eager(student, teacher, target, 2.0, 0.5))},
        case=f"kd_loss fwd+bwd N{ROWS} V{vocabulary} {'bf16' if dtype == torch.bfloat16 else 'fp32'}",
        limit=cpu_limit(traffic=3 * student.numel() * student.element_size()),
    )


class Logits(torch.autograd.Function):
    """The given logits as if a layer had just made them."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


@pytest.mark.parametrize("vocabulary", [8000, 32000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cpu_kd_loss_in_place(compare: Callable[..., Any], vocabulary: int, dtype: torch.dtype) -> None:
    """Beside the same loss out of place, on logits that are not a leaf. What comes out is the next call's student."""
    handle, student = torch.zeros((), requires_grad=True), torch.randn(ROWS, vocabulary, dtype=dtype)
    teacher, target = torch.randn(ROWS, vocabulary, dtype=dtype), torch.randint(vocabulary, (ROWS,))
    own = torch.randn(ROWS, vocabulary, dtype=dtype)

    def step(logits: Tensor, in_place: bool) -> None:
        ops.kd_loss(Logits.apply(handle, logits), teacher, target, temperature=2.0, alpha=0.5, in_place=in_place).backward()

    compare(
        lambda: step(student, True),
        {"out of place": lambda: step(own, False)},
        case=f"kd_loss in place fwd+bwd N{ROWS} V{vocabulary} {'bf16' if dtype == torch.bfloat16 else 'fp32'}",
        limit=cpu_limit(traffic=3 * student.numel() * student.element_size()),
    )


@pytest.mark.parametrize(("dtype", "vocabulary"), [(torch.bfloat16, 8000), (torch.bfloat16, 32000), (torch.float32, 8000)])
@pytest.mark.parametrize("width", [128, 512])
def test_cpu_linear_kd_loss(compare: Callable[..., Any], dtype: torch.dtype, vocabulary: int, width: int) -> None:
    hidden, weight = torch.randn(ROWS, width, requires_grad=True), (torch.randn(vocabulary, width) * width**-0.5).requires_grad_()
    teacher_hidden, teacher_weight = torch.randn(ROWS, width), torch.randn(vocabulary, width) * width**-0.5
    target = torch.randint(vocabulary, (ROWS,))
    lowered = dtype == torch.bfloat16

    def step(loss: Callable[[], Tensor]) -> None:
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            value = loss()
        value.backward()

    def peer() -> Tensor:
        return eager(F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight), target, 2.0, 0.5)

    operations = 2 * ROWS * vocabulary * width * 4  # student and teacher logits, and the gradients of hidden states and weight
    compare(
        lambda: step(lambda: ops.linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, target, temperature=2.0, alpha=0.5)),
        {"eager, autocast" if lowered else "eager": lambda: step(peer)},
        case=f"linear_kd_loss fwd+bwd N{ROWS} V{vocabulary} d{width} {'autocast bf16' if lowered else 'fp32'}",
        limit=cpu_limit(operations=operations, dtype=dtype),
    )
