"""Derivatives of an op under PyTorch's transforms, each beside what plain autograd gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def check_transforms(function: Callable[..., Any], leaves: Sequence[Tensor], rtol: float = 1e-6, atol: float = 1e-8) -> None:
    """vmap over inputs that ask for gradients, batched gradients, and torch.func.grad: alone, nested, and compiled. `function` returns one or more
    floating tensors; its leaves are cloned."""

    def loss(*tensors: Tensor) -> Tensor:
        found = function(*tensors)
        return sum(((i + 1.5) * x).sin().sum() for i, x in enumerate([found] if isinstance(found, Tensor) else found))  # type: ignore[return-value]

    def fresh(*, batch: int = 0) -> list[Tensor]:
        scales = torch.linspace(0.7, 1.2, max(batch, 1))
        return [(torch.stack([x * s for s in scales.to(x)]) if batch else x.clone()).detach().requires_grad_() for x in leaves]

    def same(got: Sequence[Tensor], want: Sequence[Tensor], what: str) -> None:
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, i=i: f"{what}, argument {i}: {text}")

    plain, every = fresh(), tuple(range(len(leaves)))
    first = torch.autograd.grad(loss(*plain), plain, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), plain)
    first = tuple(x.detach() for x in first)
    given = [x.detach() for x in plain]
    same(torch.func.grad(loss, every)(*given), first, "torch.func.grad")
    torch.compiler.reset()  # the functions of all cases share their code, and a code is compiled a few times only
    same(torch.compile(torch.func.grad(loss, every), backend="aot_eager", fullgraph=True)(*given), first, "compiled torch.func.grad")
    nested = torch.func.grad(lambda *x: sum(g.square().sum() for g in torch.func.grad(loss, every)(*x)), every)
    same(nested(*given), second, "torch.func.grad of itself")

    batched, one_by_one = fresh(batch=3), fresh(batch=3)
    got = torch.autograd.grad(torch.vmap(loss)(*batched).sum(), batched)
    want = torch.autograd.grad(sum(loss(*[x[i] for x in one_by_one]) for i in range(3)), one_by_one)
    same(got, want, "vmap")
    same(torch.vmap(torch.func.grad(loss, every))(*[x.detach() for x in batched]), want, "vmap of torch.func.grad")

    plain = fresh()
    results = function(*plain)
    results = [results] if isinstance(results, Tensor) else list(results)
    weights = [torch.stack([torch.ones_like(x), x.detach().cos()]) for x in results]
    got = torch.autograd.grad(results, plain, weights, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(results, plain, [w[i] for w in weights], retain_graph=True) for i in range(2)]
    same(got, [torch.stack(pair) for pair in zip(*each, strict=True)], "batched gradients")
