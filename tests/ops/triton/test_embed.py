"""embed in Triton (interpreted where there is no GPU) against the float64 reference and beside the reference of the same dtype."""

from __future__ import annotations

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


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of places and of columns."""
    monkeypatch.setattr(_tuning.Tuned, "config", lambda tuned, key, device: {"R": 4, "N": 16, "num_warps": 1, "num_stages": 1})


def run(backend: str, ids: Tensor, weight: Tensor, positions: Tensor | None, p: float) -> list[Tensor]:
    leaf = weight.detach().requires_grad_()
    with ops.use(backend):
        torch.manual_seed(3)
        out = ops.embed(ids, leaf, positions, scale=2.5, dropout_p=p)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return [out.detach(), *torch.autograd.grad(out, leaf, g)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.3, 0.0])
@pytest.mark.parametrize("with_positions", [True, False])
def test_two_baselines(dtype: torch.dtype, p: float, with_positions: bool) -> None:
    g = torch.Generator().manual_seed(0)
    for shape, n in (((3, 5), 20), ((7,), 3), ((0, 2), 16)):
        ids = torch.randint(9, shape, generator=g, dtype=torch.int32).to(DEVICE)
        weight = torch.randn(9, n, generator=g).to(dtype).to(DEVICE)
        positions = torch.randn(shape[-1], n, generator=g).to(DEVICE) if with_positions else None
        exact, theirs, ours = (run(backend, ids, w, positions, p) for backend, w in (("reference", weight.double()), ("reference", weight), ("triton", weight)))
        for i, (want, plain, got) in enumerate(zip(exact, theirs, ours, strict=True)):
            assert got.dtype == plain.dtype and got.shape == plain.shape
            if got.numel() == 0:
                continue
            errors = [(t.double() - want).abs().max().item() for t in (got, plain)]
            assert errors[0] <= (2 + i) * errors[1] + 4 * torch.finfo(dtype).eps * max(1.0, want.abs().max().item()), (shape, i, errors)


def test_an_id_without_a_row_reads_nothing() -> None:
    ids, weight = torch.tensor([1, 9, -1, 2**40], device=DEVICE), torch.ones(9, 20, device=DEVICE)
    with ops.use("triton"):
        out = ops.embed(ids, weight)
    assert out[0].eq(1).all() and out[1:].isnan().all()
