"""The seam between sublayers beside dropout, sum and norm of PyTorch, and what falls back to them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cvmk import ops
from cvmk.config.schema import ModelConfig
from cvmk.nn import CVMTransformer
from cvmk.nn.residual import first_norm, residual

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def inputs(dtype: torch.dtype = torch.float32, n: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(3, 5, n, generator=g).to(dtype).requires_grad_() for _ in range(2))
    return x, branch


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_beside_pytorch(norm: str, dtype: torch.dtype, backend: str | None) -> None:
    module, dropout = NORMS[norm](12, eps=1e-5).to(dtype), nn.Dropout(0.5).eval()
    nn.init.normal_(module.weight)
    x, branch = inputs(dtype)
    with ops.use(*([backend] if backend else [])):
        total, normed = residual(x, branch, dropout, module)
    want = x + branch
    tolerance = {"rtol": 3 * torch.finfo(dtype).eps, "atol": 3 * torch.finfo(dtype).eps}
    torch.testing.assert_close(total, want, rtol=0, atol=0)
    torch.testing.assert_close(normed, module(want), **tolerance)
    torch.testing.assert_close(first_norm(want, module), module(want), **tolerance)


def test_autocast_keeps_the_stream_and_gives_what_the_product_reads() -> None:
    x, branch = inputs()
    module = nn.LayerNorm(12)
    with torch.autocast("cpu", torch.bfloat16):
        total, normed = residual(x, branch.bfloat16(), nn.Dropout(0.0), module)
        assert first_norm(x, module).dtype == torch.bfloat16
        want = module(x + branch.bfloat16())
    assert total.dtype == torch.float32 and normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed, want.bfloat16(), rtol=2**-8, atol=1e-6)


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_other_norms_and_hooks_are_called() -> None:
    x, branch = inputs()
    plain, other = nn.LayerNorm(12), Doubled(12)
    _, normed = residual(x, branch, nn.Dropout(0.0), other)
    torch.testing.assert_close(normed, 2 * plain(x + branch))
    torch.testing.assert_close(first_norm(x, other), 2 * plain(x))
    seen: list[Any] = []
    plain.register_forward_hook(lambda module, given, result: seen.append(result))
    assert residual(x, branch, nn.Dropout(0.0), plain)[1] is seen[0] and first_norm(x, plain) is seen[1]
    bare = nn.LayerNorm(12, elementwise_affine=False)
    torch.testing.assert_close(residual(x, branch, nn.Dropout(0.0), bare)[1], bare(x + branch))
    total, _ = residual(x, branch, nn.Dropout(1.0), nn.LayerNorm(12))
    assert torch.equal(total, x)
    root = nn.RMSNorm(12, eps=None)
    torch.testing.assert_close(residual(x, branch, nn.Dropout(0.0), root)[1], root(x + branch))


def step(model: CVMTransformer, seed: int = 3) -> list[Tensor]:
    """A step's gradients. (One row of the source is padding only.)"""
    torch.manual_seed(seed)
    src, tgt = torch.randint(4, 30, (4, 9)), torch.randint(4, 30, (4, 7))
    src[1, 5:] = tgt[2, 3:] = src[3] = 0
    model.zero_grad()
    model(src, tgt)[0].square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_backends_agree_in_the_model(norm: str) -> None:
    """Every mask is the same, so a step of training differs by rounding only; copies, accumulation and frozen norms too."""
    torch.manual_seed(0)
    sizes = {"d_model": 24, "ffn": 40, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "max_length": 16, "dropout": 0.3, "norm": norm}
    model = CVMTransformer(ModelConfig(**sizes), 30)
    found = [x.clone() for x in step(model)]
    with ops.use("reference"):
        want = step(copy.deepcopy(model))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(found, step(copy.deepcopy(model)), strict=True))
    frozen = copy.deepcopy(model)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("norm" not in name)
    step(frozen)
    for (name, a), b in zip(frozen.named_parameters(), found, strict=True):
        assert a.grad is None if "norm" in name else torch.equal(a.grad, b), name


def test_compiled_model_trains() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "ffn": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "max_length": 16, "dropout": 0.2}
    model = CVMTransformer(ModelConfig(**sizes), 30)
    src, tgt = torch.randint(4, 30, (3, 6)), torch.randint(4, 30, (3, 5))

    def loss(forward: Any) -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        forward(src, tgt)[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for a, b in zip(loss(model), loss(torch.compile(model, backend="aot_eager")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
