"""linear_kd_loss in Triton (interpreted where there is no GPU) against the float64 reference and beside the reference of the same dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cvmk import ops
from cvmk.ops import triton
from cvmk.ops.kd_loss import DIVERGENCES
from cvmk.ops.triton import _tuning, linear_kd_loss

pytestmark = [
    pytest.mark.skipif(triton.reason() is not None, reason=f"{triton.reason()}"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
Case = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several chunks, and several tiles of a row."""
    with monkeypatch.context() as patch:
        patch.setattr(linear_kd_loss, "CHUNK", 1)
        patch.setattr(linear_kd_loss, "CHUNK_ROWS", 5)
        patch.setattr(_tuning.Tuned, "config", lambda *_: {"PER_THREAD": 4, "num_warps": 1, "num_stages": 1})
        yield


def make(rows: int, vocabulary: int, width: int, teacher_width: int, dtype: torch.dtype = torch.bfloat16, bias: bool = True, seed: int = 0) -> Case:
    """hidden, weight, bias, teacher's hidden, weight, bias, target."""
    g = torch.Generator().manual_seed(seed)
    sides = []
    for d in (width, teacher_width):
        hidden, weight = torch.randn(rows, d, generator=g), torch.randn(vocabulary, d, generator=g) * 3 * d**-0.5
        sides += [hidden.to(dtype), weight.to(dtype), torch.randn(vocabulary, generator=g).to(dtype) * float(bias)]
    target = torch.randint(vocabulary, (rows,), generator=g)
    target[1::4] = -100
    return tuple(x.to(DEVICE) for x in (*sides, target))


def run(backend: str, case: Case, part: int = 0, double: bool = False, **options: Any) -> list[Tensor]:
    """The loss and the gradients of hidden, weight and bias."""
    *tensors, target = case
    if double:
        tensors = [x.double() for x in tensors]
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    with ops.use(backend):
        value = ops.linear_kd_loss(
            leaves[0], leaves[1], tensors[3], tensors[4], target, student_bias=leaves[2], teacher_bias=tensors[5], return_parts=True, **options
        )[part]
        return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "temperature"), [(torch.bfloat16, 1.0), (torch.float32, 2.0), (torch.float16, 3.0)])
def test_two_baselines(name: str, dtype: torch.dtype, temperature: float) -> None:
    """Root-mean-square error against float64 over odd shapes: at most that of the reference of the same dtype, twice (loss) or thrice."""
    errors: dict[str, list[list[Tensor]]] = {"triton": [[], [], [], []], "reference": [[], [], [], []]}
    for seed, shape in enumerate([(4, 7, 3, 9), (7, 300, 40, 64)]):
        case = make(*shape, dtype, seed=seed)
        options: dict[str, Any] = {"temperature": temperature, "divergence": name, "label_smoothing": 0.1}
        exact = run("reference", case, double=True, **options)
        for backend, found in errors.items():
            for i, (value, right) in enumerate(zip(run(backend, case, **options), exact, strict=True)):
                found[i].append((value.double() - right).flatten() / right.abs().max())
    for i, factor in enumerate((2, 3, 3, 3)):
        ours, theirs = (torch.cat(errors[backend][i]).square().mean().sqrt() for backend in ("triton", "reference"))
        assert ours <= factor * theirs + 3e-7, i


@pytest.mark.parametrize("part", [0, 1, 2])
def test_parts(part: int) -> None:
    case = make(7, 300, 48, 32)
    exact, found = (run(backend, case, part, double, temperature=2.0, alpha=0.3) for backend, double in (("reference", True), ("triton", False)))
    assert found[0].item() == pytest.approx(exact[0].item(), rel=3e-6)
    for value, right in zip(found[1:], exact[1:], strict=True):
        assert (value.double() - right).abs().max() <= 0.02 * right.abs().max()


def test_agrees_with_kd_loss_and_without_a_teacher() -> None:
    hidden, weight, _, teacher_hidden, teacher_weight, _, target = make(9, 150, 64, 32, bias=False)
    with ops.use("triton"):
        found = ops.linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, target, temperature=2.0)
        alone = ops.linear_kd_loss(hidden, weight, None, None, target, alpha=0.0, label_smoothing=0.1)
    z, t = hidden.double() @ weight.double().t(), teacher_hidden.double() @ teacher_weight.double().t()
    with ops.use("reference"):
        assert found.item() == pytest.approx(ops.kd_loss(z, t, target, temperature=2.0).item(), rel=3e-6)
        assert alone.item() == pytest.approx(ops.kd_loss(z, None, target, alpha=0.0, label_smoothing=0.1).item(), rel=3e-6)


def test_ignored_rows_are_not_read_and_strides() -> None:
    hidden, weight, _, teacher_hidden, teacher_weight, _, target = make(7, 300, 64, 64)
    ignored = target == -100

    def both(h: Tensor, w: Tensor, th: Tensor) -> list[Tensor]:
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        with ops.use("triton"):
            loss = ops.linear_kd_loss(h, w, th, teacher_weight, target)
            return [loss.detach(), *torch.autograd.grad(loss, (h, w))]

    expected = both(hidden, weight, teacher_hidden)
    assert not expected[1][ignored].any() and expected[1][~ignored].any()
    poisoned, poisoned_teacher = hidden.clone(), teacher_hidden.clone()
    poisoned[ignored] = float("nan")
    poisoned_teacher[ignored] = INF
    assert all(torch.equal(a, b) for a, b in zip(both(poisoned, weight, poisoned_teacher), expected, strict=True))
    for found in (
        both(torch.cat([torch.full_like(hidden, float("nan")), hidden], 1)[:, 64:], torch.cat([weight, weight * float("nan")], 1)[:, :64], teacher_hidden),
        both(hidden.t().contiguous().t(), weight, teacher_hidden),
    ):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-4)


def test_leading_dimensions_and_repeatability() -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target = case = make(12, 150, 16, 24)
    whole = run("triton", case)
    assert all(torch.equal(a, b) for a, b in zip(whole, run("triton", case), strict=True))
    cube = (hidden.view(3, 4, 16), weight, bias, teacher_hidden.view(3, 4, 24), teacher_weight, teacher_bias, target.view(3, 4))
    found = run("triton", cube)
    assert torch.equal(found[1].view(12, 16), whole[1]) and torch.equal(found[2], whole[2])


def test_nothing_to_learn_from() -> None:
    *tensors, target = make(6, 40, 8, 8)
    for found in (run("triton", (*tensors, target.fill_(-100))), run("triton", (*[x[:0] if i % 3 == 0 else x for i, x in enumerate(tensors)], target[:0]))):
        assert not any(x.any() for x in found)


def test_frozen_operands_and_backward_twice() -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight, _, target = make(8, 90, 16, 16)
    for leaf in range(3):
        tensors = [hidden.detach(), weight.detach(), bias.detach()]
        tensors[leaf].requires_grad_()
        with ops.use("triton"):
            loss = ops.linear_kd_loss(tensors[0], tensors[1], teacher_hidden, teacher_weight, target, student_bias=tensors[2])
            (first,) = torch.autograd.grad(loss, tensors[leaf], retain_graph=True)
            (second,) = torch.autograd.grad(loss * 2, tensors[leaf])
        assert torch.equal(second, first * 2) and first.any()
    with ops.use("triton"), torch.no_grad():
        assert ops.linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, target, student_bias=bias).item() == pytest.approx(loss.item(), rel=1e-6)


def test_masked_vocabulary() -> None:
    """A bias of -inf on both sides takes entries out."""
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target = make(6, 300, 32, 32)
    target = target.clamp(max=199)
    target[::3] = -100
    short = (hidden, weight[:200], bias[:200], teacher_hidden, teacher_weight[:200], teacher_bias[:200], target)
    bias[200:] = teacher_bias[200:] = -INF
    for name in DIVERGENCES:
        full = run("triton", (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target), divergence=name, label_smoothing=0.1)
        expected = run("reference", short, double=True, divergence=name, label_smoothing=0.1)
        assert full[0].item() == pytest.approx(expected[0].item(), rel=3e-6)
        assert (full[1].double() - expected[1]).abs().max() <= 0.02 * expected[1].abs().max()
        assert not full[2][200:].any() and not full[3][200:].any()


def test_no_tensor_of_rows_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated in a call: buffers of a chunk, never all rows."""
    sizes: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append((x := empty(*a, **k)).numel()) or x)
    run("triton", make(20, 500, 4, 4))
    assert sizes and max(sizes) <= 5 * 512


def test_what_is_declined() -> None:
    hidden, weight, _, teacher_hidden, teacher_weight, _, target = make(3, 5, 8, 8)
    found = {e.backend: e for e in ops.explain("linear_kd_loss", hidden, weight, teacher_hidden.double(), teacher_weight.double(), target)}
    assert "teacher_weight is torch.float64" in found["triton"].reasons[0]
    found = {e.backend: e for e in ops.explain("linear_kd_loss", hidden, weight, teacher_hidden, teacher_weight, target)}
    if DEVICE == "cuda":
        assert not found["triton"].reasons
    else:
        assert "interpreted" in found["triton"].reasons[0]
