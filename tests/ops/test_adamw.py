"""One step of AdamW: beside torch.optim.AdamW in float64, the kernels beside the reference, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cvmk import ops
from cvmk.ops import native
from cvmk.ops._op import forget_choices

from .native._linear import LEVELS

OPTIONS: dict[str, Any] = {"learning_rate": 0.03, "betas": (0.9, 0.98), "eps": 1e-9, "weight_decay": 0.1}
needs_native = pytest.mark.skipif(native.library() is None, reason="the native library is not there")


def state(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """param, grad, exp_avg, exp_avg_sq"""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(4)]
    found[3] = found[3].square()
    return [x.to(dtype) for x in found]


def stepped(tensors: list[Tensor], backend: str = "native", **options: Any) -> list[Tensor]:
    """New param and moments."""
    param, grad, first, second = (x.clone() for x in tensors)
    with ops.use(backend):
        assert ops.adamw(param, grad, first, second, **{"step": 3, **OPTIONS, **options}) is None
    torch.testing.assert_close(grad, tensors[1], rtol=0, atol=0, equal_nan=True)
    return [param, first, second]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_pytorch_in_float64(decay: float) -> None:
    param, _, first, second = state(50, torch.float64)
    first.zero_(), second.zero_()
    peer = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([peer], lr=0.03, betas=(0.9, 0.98), eps=1e-9, weight_decay=decay)
    for step in range(1, 6):
        grad = state(50, torch.float64, seed=step)[1]
        peer.grad = grad * 0.25
        optimizer.step()
        ops.adamw(param, grad, first, second, step=step, grad_scale=torch.tensor(0.25, dtype=torch.float64), **{**OPTIONS, "weight_decay": decay})
        torch.testing.assert_close(param, peer.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close([first, second], [optimizer.state[peer][name] for name in ("exp_avg", "exp_avg_sq")], rtol=1e-13, atol=1e-14)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 33, 40000])
def test_kernels_are_as_exact_as_the_reference_and_cut_memory_as_they_like(level: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVMK_CPU_ISA", level)
    forget_choices()
    tensors, scale = state(count), torch.tensor(0.3)
    exact = stepped([x.double() for x in tensors], "reference", grad_scale=scale.double())
    ours, theirs = stepped(tensors, grad_scale=scale), stepped(tensors, "reference", grad_scale=scale)
    for want, got, peer in zip(exact, ours, theirs, strict=True):
        errors = [(x.double() - want).abs().max().item() if count else 0.0 for x in (got, peer)]
        assert errors[0] <= 2 * errors[1] + 4e-7 * max(1.0, want.abs().max().item() if count else 0.0), (level, errors)
    halves = [stepped([x[part] for x in tensors], grad_scale=scale) for part in (slice(count // 3), slice(count // 3, None))]
    assert all(torch.equal(torch.cat(parts), whole) for *parts, whole in zip(*halves, ours, strict=True))


@needs_native
def test_the_same_bits_for_any_number_of_threads() -> None:
    tensors, before = state(100_000), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(stepped(tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_native
def test_nan_and_infinities_stay_where_they_are() -> None:
    tensors, clean = state(40), stepped(state(40))
    tensors[1][7], tensors[0][20] = float("nan"), float("inf")
    for got, before in zip(stepped(tensors), clean, strict=True):
        others = torch.tensor([i not in (7, 20) for i in range(40)])
        assert torch.equal(got[others], before[others]) and not got[7].isfinite()


def test_memory_with_gaps_is_written_in_place() -> None:
    tensors = state(24)
    expected = stepped(tensors, "reference")
    wide = [torch.full((4, 12), 5.0) for _ in range(4)]
    views = [w[:, ::2].copy_(x.view(4, 6)) for w, x in zip(wide, tensors, strict=True)]
    ops.adamw(*views, step=3, **OPTIONS)
    for i, want in zip((0, 2, 3), expected, strict=True):
        torch.testing.assert_close(views[i].reshape(-1), want)
        assert (wide[i][:, 1::2] == 5).all()


def test_whoever_saved_a_weight_is_told_that_it_changed() -> None:
    param, grad, first, second = state(8)
    before = param._version
    ops.adamw(param, grad, first, second, step=1, **OPTIONS)
    assert param._version > before
    leaf = torch.ones(8, requires_grad=True)
    product = leaf * param
    ops.adamw(param, grad, first, second, step=2, **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_it_compiles_and_passes_opcheck() -> None:
    tensors = state(8)
    expected = stepped(tensors, "reference")
    param, grad, first, second = (x.clone() for x in tensors)
    torch.compile(lambda: ops.adamw(param, grad, first, second, step=3, **OPTIONS), backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close([param, first, second], expected)
    torch.library.opcheck(torch.ops.cvmk.adamw_forward.default, (param, first, second, grad, None, 3, 0.03, 0.9, 0.98, 1e-9, 0.1))


def test_refusals() -> None:
    def run(changed: dict[str, Any] | None = None, **options: Any) -> None:
        tensors = dict(zip(("param", "grad", "exp_avg", "exp_avg_sq"), state(8), strict=True)) | (changed or {})
        ops.adamw(**tensors, **{"step": 1, **OPTIONS, **options})

    with pytest.raises(TypeError, match="grad is torch.bfloat16"):
        run({"grad": torch.zeros(8, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=r"exp_avg has the shape \(9,\); it must be \(8,\)"):
        run({"exp_avg": torch.zeros(9)})
    with pytest.raises(ValueError, match="grad_scale has the shape"):
        run(grad_scale=torch.ones(2))
    with pytest.raises(RuntimeError, match="param asks for one"):
        run({"param": torch.zeros(8, requires_grad=True)})
    with pytest.raises(ValueError, match="step is 0"):
        run(step=0)
    with pytest.raises(ValueError, match="betas"):
        run(betas=(1.0, 0.5))
    with torch.no_grad():
        run({"param": torch.zeros(8, requires_grad=True)})
