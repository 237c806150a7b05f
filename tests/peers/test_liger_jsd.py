"""The grids of Liger-Kernel's test_jsd_loss.py and test_fused_linear_jsd.py, written anew for cvmk's losses and with tighter tolerances.

Liger's generalised Jensen-Shannon divergence with weight beta is cvmk's "js" of mixture beta, forward KL at beta 0 and reverse KL at 1; its
hard and soft weights are 1 - alpha and alpha. Oracle: the definition on dense float64 logits. Liger allows bfloat16 an error of 5e-2
(relative 5e-1) in its chunked loss; here the loss is right to 1e-5, and gradients to the rounding of their type.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk import ops

SHAPES = [(2, 64, 256, 4096), (3, 47, 31, 123)]  # batch, length, width, vocabulary; Liger's first is (8, 128, 1024, 4096)
BETAS = [0.0, 0.1, 0.2, 0.5, 0.8, 0.9, 1.0]


def divergence_of(beta: float) -> dict[str, Any]:
    if beta in (0.0, 1.0):
        return {"divergence": "forward_kl" if beta == 0 else "reverse_kl"}
    return {"divergence": "js", "mixture": beta}


def oracle(z: Tensor, t: Tensor, target: Tensor, beta: float, temperature: float, alpha: float, ignore_index: int) -> Tensor:
    rows = target.reshape(-1) != ignore_index
    z, t, y = z.reshape(-1, z.shape[-1])[rows], t.reshape(-1, t.shape[-1])[rows], target.reshape(-1)[rows]
    log_q, log_p = F.log_softmax(z / temperature, -1), F.log_softmax(t / temperature, -1)
    if beta in (0.0, 1.0):
        value = F.kl_div(log_q, log_p, log_target=True, reduction="sum") if beta == 0 else F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    else:
        log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        value = beta * F.kl_div(log_m, log_p, log_target=True, reduction="sum") + (1 - beta) * F.kl_div(log_m, log_q, log_target=True, reduction="sum")
    return (alpha * temperature**2 * value + (1 - alpha) * F.cross_entropy(z, y, reduction="sum")) / max(1, int(rows.sum()))


def targets(shape: tuple[int, int], vocabulary: int, ignore_index: int, g: torch.Generator) -> Tensor:
    target = torch.randint(vocabulary, shape, generator=g)
    target.view(-1)[torch.randperm(target.numel(), generator=g)[: target.numel() // 3]] = ignore_index
    return target


def check(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for value, right in zip(found[1:], expected[1:], strict=True):
        relative = ((value.double() - right).norm() / right.norm()).item()
        assert relative <= (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("temperature", "beta", "alpha", "ignore_index"),
    [(1.0, 0.5, 0.5, -100), (2.0, 0.8, 0.5, 42), (0.5, 0.2, 0.9, -100), (1.0, 0.0, 1.0, 42), (2.0, 1.0, 0.0, -100)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_jsd_loss(
    shape: tuple[int, int, int, int], dtype: torch.dtype, temperature: float, beta: float, alpha: float, ignore_index: int, bias: bool
) -> None:
    """Student of half the teacher's width, both with output layers; loss and the gradients of hidden states, weight and bias."""
    batch, length, width, vocabulary = shape
    g = torch.Generator().manual_seed(42)
    make = lambda *size: torch.randn(*size, generator=g).to(dtype)  # noqa: E731
    hidden, weight, teacher_hidden = make(batch, length, width // 2), make(vocabulary, width // 2) * width**-0.5, make(batch, length, width)
    teacher_weight = make(vocabulary, width) * width**-0.5
    student_bias, teacher_bias = (make(vocabulary), make(vocabulary)) if bias else (None, None)
    target = targets((batch, length), vocabulary, ignore_index, g)

    def run(double: bool) -> list[Tensor]:
        cast = lambda x: None if x is None else x.double() if double else x.clone()  # noqa: E731
        leaves = [cast(x).requires_grad_() for x in (hidden, weight, student_bias) if x is not None]
        some_bias = leaves[2] if bias else None
        if double:
            loss = oracle(
                F.linear(leaves[0], leaves[1], some_bias), F.linear(cast(teacher_hidden), cast(teacher_weight), cast(teacher_bias)), target, beta,
                temperature, alpha, ignore_index,
            )  # fmt: skip
        else:
            loss = ops.linear_kd_loss(
                leaves[0], leaves[1], teacher_hidden, teacher_weight, target, student_bias=some_bias, teacher_bias=teacher_bias,
                temperature=temperature, alpha=alpha, ignore_index=ignore_index, **divergence_of(beta),
            )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    check(run(False), run(True), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jsd_of_logits(dtype: torch.dtype, beta: float, temperature: float) -> None:
    for batch, length, vocabulary in ((2, 64, 4096), (3, 47, 123), (1, 41, 1271)):
        g = torch.Generator().manual_seed(int(beta * 10))
        z, t = (torch.randn(batch, length, vocabulary, generator=g).to(dtype) for _ in range(2))
        target = targets((batch, length), vocabulary, -100, g)
        results = []
        for x in (z.clone(), z.double()):
            x.requires_grad_()
            if x.dtype == torch.float64:
                loss = oracle(x, t.double(), target, beta, temperature, 1.0, -100)
            else:
                loss = ops.kd_loss(x, t, target, temperature=temperature, alpha=1.0, **divergence_of(beta))
            results.append([loss.detach(), *torch.autograd.grad(loss, x)])
        check(results[0], results[1], dtype)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_fused_linear_jsd_all_ignored(beta: float) -> None:
    hidden, weight = torch.randn(8, 32).bfloat16().requires_grad_(), torch.randn(50, 32).bfloat16().requires_grad_()
    target = torch.full((8,), -100)
    loss = ops.linear_kd_loss(hidden, weight, torch.randn(8, 64).bfloat16(), torch.randn(50, 64).bfloat16(), target, **divergence_of(beta))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and weight.grad is not None and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_fused_linear_jsd_amp(beta: float) -> None:
    """Under autocast: float32 parameters, bfloat16 products; gradients come back in float32."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(94, 31, generator=g), torch.randn(1271, 31, generator=g) * 0.2
    teacher_hidden, teacher_weight = torch.randn(94, 62, generator=g), torch.randn(1271, 62, generator=g) * 0.2
    target = targets((2, 47), 1271, -100, g).reshape(-1)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_kd_loss(*leaves, teacher_hidden, teacher_weight, target, temperature=1.0, alpha=1.0, **divergence_of(beta))
    grads = torch.autograd.grad(loss, leaves)
    assert all(grad.dtype == torch.float32 for grad in grads)
    lowered = [x.bfloat16().double().requires_grad_() for x in (hidden, weight)]
    z, t = lowered[0] @ lowered[1].t(), teacher_hidden.bfloat16().double() @ teacher_weight.bfloat16().double().t()
    exact = oracle(z, t, target, beta, 1.0, 1.0, -100)
    check([loss.detach(), *grads], [exact.detach(), *torch.autograd.grad(exact, lowered)], torch.bfloat16)
