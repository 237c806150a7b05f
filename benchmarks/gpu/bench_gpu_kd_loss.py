"""GPU rows of kd_loss and linear_kd_loss: plain PyTorch, torch.compile of it, and Liger. Run by contestants.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk import ops
from gpu.contestants import Row, peer

OPTIONS: dict[str, Any] = {"temperature": 2.0, "alpha": 0.5}


def eager(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The loss in float32, as it is written down."""
    student, teacher = student.float(), teacher.float()
    divergence = F.kl_div(F.log_softmax(student / 2.0, -1), F.log_softmax(teacher / 2.0, -1), log_target=True, reduction="batchmean")
    return 0.5 * 4.0 * divergence + 0.5 * F.cross_entropy(student, target)


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    count = 64 if small else 8192
    for vocabulary in (320,) if small else (32000, 128256):
        yield _kd(device, count, vocabulary, "forward_kl")
        if device.type == "cuda":
            yield _over_the_logits(device, count, vocabulary)
    yield _kd(device, count, 257 if small else 50257, "forward_kl")
    yield _kd(device, count, 320 if small else 32000, "js")
    for vocabulary, widths in {320: (32,)}.items() if small else {32000: (512, 1024, 4096), 128256: (512, 2048, 4096)}.items():
        for width in widths:
            yield _linear(device, count, vocabulary, width)


def _kd(device: torch.device, count: int, vocabulary: int, divergence: str) -> Row:
    student = torch.randn(count, vocabulary, device=device).mul_(3).bfloat16().requires_grad_()
    teacher = torch.randn(count, vocabulary, device=device).mul_(3).bfloat16()
    target = torch.randint(vocabulary, (count,), device=device)
    options = OPTIONS | {"divergence": divergence}

    def step(loss: Callable[[], Tensor]) -> None:
        student.grad = None
        loss().backward()

    def liger() -> Callable[[], None]:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

        kl, ce = LigerKLDIVLoss(reduction="batchmean", log_target=True), LigerCrossEntropyLoss()
        return lambda: step(
            lambda: 2.0 * kl(F.log_softmax(student / 2.0, -1), F.log_softmax(teacher / 2.0, -1)) + 0.5 * ce(student, target)
        )

    peers: dict[str, Any] = {}
    if divergence == "forward_kl":
        compiled = torch.compile(eager) if device.type == "cuda" else eager
        peers = {
            "eager": lambda: step(lambda: eager(student, teacher, target)),
            "torch.compile": lambda: step(lambda: compiled(student, teacher, target)),
            "liger": peer("liger", liger),
        }
    return Row(
        "kd_loss fwd+bwd",
        f"N{count} V{vocabulary} bf16 {divergence}",
        lambda: step(lambda: ops.kd_loss(student, teacher, target, **options)),
        peers,
        traffic=3.0 * 2 * count * vocabulary,
        targets=(("limit", 0.7), ("liger", 3.0)) if divergence == "forward_kl" and vocabulary % 16 == 0 else (),
        memory=True,
        arguments=functools.partial(ops.explain, "kd_loss", student, teacher, target, **options),
    )


def _over_the_logits(device: torch.device, count: int, vocabulary: int) -> Row:
    """The one launch that reads both logits once and writes the gradient over the student's; what comes out is the next call's student."""
    from cvmk.ops.kd_loss import Call
    from cvmk.ops.triton.kd_loss import launch_rows

    student, teacher = (torch.randn(count, vocabulary, device=device).mul_(3).bfloat16() for _ in range(2))
    target, stats, losses = torch.randint(vocabulary, (count,), device=device), torch.empty(5, count, device=device), torch.empty(2, count, device=device)
    call = Call(student, teacher, target, None, 2.0, 0.5, "forward_kl", 0.0, 0.0, -100)
    return Row(
        "kd_rows, gradient in place",
        f"N{count} V{vocabulary} bf16 forward_kl",
        lambda: launch_rows(student, teacher, (None, None), target, stats, losses, call, gradient=student),
        traffic=3.0 * 2 * count * vocabulary,
        targets=(("limit", 0.7),),
    )


def _liger_chunked() -> Callable[..., Tensor]:
    """Liger's loss with the same weights; its divergence lacks T^2, which costs nothing."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0, temperature=2.0)


def errors(device: torch.device, small: bool) -> dict[str, Any]:
    """Error of the gradients against float64, relative to their size, where half of the loss is cross-entropy and half KL at temperature 2 (no T^2)."""
    count, vocabulary, width = (32, 96, 16) if small else (2048, 8000, 512)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).bfloat16()

    tensors = normal(count, width), normal(vocabulary, width, scale=3 * width**-0.5), normal(count, width), normal(vocabulary, width, scale=3 * width**-0.5)
    target = torch.randint(vocabulary, (count,), device=device)

    def gradients(loss: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
        hidden, weight, *teacher = (x.to(dtype) for x in tensors)
        return torch.autograd.grad(loss(hidden.requires_grad_(), weight.requires_grad_(), *teacher, target), (hidden, weight))

    def ours(*arguments: Tensor) -> Tensor:
        _, kd, ce = ops.linear_kd_loss(*arguments, temperature=2.0, return_parts=True)
        return 0.5 * kd / 4.0 + 0.5 * ce

    with ops.use("reference"):
        exact = gradients(ours, torch.float64)
    found: dict[str, Any] = {}
    for name, make in {"cvmk": lambda: ours, "liger chunked": _liger_chunked}.items():
        try:
            grads = gradients(make())
            found[name] = [float((grad.double() - right).norm() / right.norm()) for grad, right in zip(grads, exact, strict=True)]
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return {"linear_kd_loss, relative error of the gradients of hidden states and weight": found}


def _linear(device: torch.device, count: int, vocabulary: int, width: int) -> Row:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).bfloat16()

    hidden, weight = normal(count, width).requires_grad_(), normal(vocabulary, width, scale=3 * width**-0.5).requires_grad_()
    teacher_hidden, teacher_weight = normal(count, width), normal(vocabulary, width, scale=3 * width**-0.5)
    target = torch.randint(vocabulary, (count,), device=device)

    def step(loss: Callable[[], Tensor]) -> None:
        hidden.grad = weight.grad = None
        loss().backward()

    def ours() -> Tensor:
        return ops.linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, target, **OPTIONS)

    def liger() -> Callable[[], None]:
        loss = _liger_chunked()
        return lambda: step(lambda: loss(hidden, weight, teacher_hidden, teacher_weight, target))

    return Row(
        "linear_kd_loss fwd+bwd",
        f"N{count} V{vocabulary} d{width} bf16",
        lambda: step(ours),
        {
            "eager": lambda: step(lambda: eager(F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight), target)),
            "liger chunked": peer("liger", liger),
        },
        operations=8.0 * count * vocabulary * width,
        targets=(("liger chunked", 1.5), ("limit", 0.55 * 790 / 989)),
        memory=True,
        arguments=functools.partial(ops.explain, "linear_kd_loss", hidden, weight, teacher_hidden, teacher_weight, target, **OPTIONS),
    )
