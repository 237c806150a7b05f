"""residual_norm in Triton (interpreted where there is no GPU) against the float64 reference and beside the reference of the same dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cvmk import ops
from cvmk.ops import triton
from cvmk.ops.triton import _tuning

pytestmark = [
    pytest.mark.skipif(triton.reason() is not None, reason=f"{triton.reason()}"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXES = ((torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float32), (torch.bfloat16,) * 3, (torch.float16, torch.float32, torch.float16))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, and several a program (the interpreter plays 4 multiprocessors)."""
    monkeypatch.setattr(_tuning.Tuned, "config", lambda tuned, key, device: {"R": 2, "num_warps": 1, "num_stages": 1})


def make(rows: int, n: int, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    """x, branch, weight, bias."""
    g = torch.Generator().manual_seed(n)
    shapes, kinds = ((rows, n), (rows, n), (n,), (n,)), (*dtypes, dtypes[-1])
    return [torch.randn(shape, generator=g).to(kind).to(DEVICE) for shape, kind in zip(shapes, kinds, strict=True)]


def run(backend: str, tensors: list[Tensor], double: bool = False, alone: bool = False, **options: Any) -> list[Tensor]:
    """Results and gradients; the seed of dropout is the same everywhere."""
    leaves = [(t.double() if double else t).detach().requires_grad_() for t in tensors]
    x, branch, weight, bias = leaves
    with ops.use(backend):
        torch.manual_seed(1)
        found = ops.residual_norm(x, None if alone else branch, weight, bias, **options)
        used = [x, weight, bias] if alone else leaves
        g = torch.Generator().manual_seed(9)
        weights = [torch.randn(t.shape, generator=g).to(t) for t in found]
        return [t.detach() for t in found] + list(torch.autograd.grad(found, used, weights))


@pytest.mark.parametrize("dtypes", MIXES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("p", [0.3, 0.0, 0.999])
@pytest.mark.parametrize("alone", [False, True])
def test_two_baselines(dtypes: tuple[torch.dtype, ...], norm: str, p: float, alone: bool) -> None:
    for rows, n in ((1, 3), (23, 20), (5, 64)):
        tensors, options = make(rows, n, dtypes), {"norm": norm, "dropout_p": p, "alone": alone}
        exact, theirs, ours = run("reference", tensors, double=True, **options), run("reference", tensors, **options), run("triton", tensors, **options)
        for i, (want, plain, got) in enumerate(zip(exact, theirs, ours, strict=True)):
            assert got.dtype == plain.dtype and got.shape == plain.shape
            errors = [(t.double() - want).abs().max().item() for t in (got, plain)]
            floor = 4 * torch.finfo(got.dtype).eps * max(1.0, want.abs().max().item())
            assert errors[0] <= (2 if i < 2 else 3) * errors[1] + floor, (rows, n, i, errors)


def test_the_mask_is_the_references() -> None:
    x, branch, weight = torch.zeros(9, 40, device=DEVICE), torch.ones(9, 40, device=DEVICE), torch.ones(40, device=DEVICE)
    masks = []
    for backend in ("triton", "reference"):
        with ops.use(backend):
            torch.manual_seed(4)
            masks.append(ops.residual_norm(x, branch, weight, dropout_p=0.4)[0] != 0)
    assert torch.equal(*masks) and masks[0].any() and not masks[0].all()


def test_runs_repeat_and_frozen_tensors() -> None:
    tensors = make(40, 24, MIXES[1])
    first, again = (run("triton", tensors, dropout_p=0.2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    x, branch, weight, bias = tensors
    with ops.use("triton"):
        leaf = weight.clone().requires_grad_()
        torch.manual_seed(1)
        total, normed = ops.residual_norm(x, branch, leaf, bias, dropout_p=0.2)
        assert torch.equal(total, first[0])
        normed.sum().backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()
        for rows in (0, 1):
            empty = run("triton", make(rows, 8, MIXES[0]))
            assert [t.shape[0] for t in empty] == [rows] * 4 + [8] * 2 and (rows or not empty[4].any())


def test_wide_rows_are_declined() -> None:
    x, weight = torch.zeros(1, 16385, device=DEVICE), torch.ones(16385, device=DEVICE)
    with ops.use("triton"), pytest.raises(NotImplementedError, match="rows have 16385 numbers, more than 16384"):
        ops.residual_norm(x, x, weight)
