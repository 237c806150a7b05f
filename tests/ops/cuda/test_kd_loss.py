"""kd_loss by its CUDA kernels, against the float64 reference and beside the reference of the same dtype."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import cuda_on_cpu
import pytest
import torch
from cuda_on_cpu import DEVICE
from torch import Tensor

from cvmk import ops
from cvmk.ops.kd_loss import DIVERGENCES

pytestmark = pytest.mark.timeout(300)  # the first test waits for the compiler
INF = float("inf")


def make(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, vocabulary, generator=g).mul_(3).to(DEVICE, dtype) for _ in range(2))
    target = torch.randint(vocabulary, (rows,), generator=g)
    target[::5] = -100
    return student, teacher, target.to(DEVICE)


def run(backend: str, student: Tensor, teacher: Tensor | None, target: Tensor, part: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    with ops.use(backend):
        value = ops.kd_loss(student, teacher, target, return_parts=True, **options)[part]
        (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_two_baselines(dtype: torch.dtype, name: str, temperature: float) -> None:
    """Root-mean-square error against float64 of the same values: at most that of the reference of the same dtype, twice (loss) or thrice."""
    errors: dict[str, list[Tensor]] = {"cuda": [], "reference": []}
    losses: dict[str, float] = {"cuda": 0.0, "reference": 0.0}
    for vocabulary in (3, 17, 64, 333, 2051, 4500):
        student, teacher, target = make(7, vocabulary, dtype, seed=vocabulary)
        options: dict[str, Any] = {"temperature": temperature, "divergence": name, "label_smoothing": 0.1}
        exact = run("reference", student.double(), teacher.double(), target, **options)
        for backend in errors:
            loss, grad = run(backend, student, teacher, target, **options)
            assert loss.dtype == torch.float32 and grad.dtype == dtype
            losses[backend] += ((loss.double() - exact[0]) / exact[0]).item() ** 2
            errors[backend].append((grad.double() - exact[1]).flatten() / exact[1].abs().max())
    ours, theirs = (torch.cat(errors[backend]).square().mean().sqrt() for backend in ("cuda", "reference"))
    assert ours <= 3 * theirs + 3e-8
    assert losses["cuda"] ** 0.5 <= 2 * losses["reference"] ** 0.5 + 3e-7


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_parts_and_no_teacher(part: int, alpha: float) -> None:
    student, teacher, target = make(9, 70)
    for temperature in (1.0, 0.7):
        exact = run("reference", student.double(), teacher.double(), target, part, temperature=temperature, alpha=alpha)
        found = run("cuda", student, teacher, target, part, temperature=temperature, alpha=alpha)
        torch.testing.assert_close([x.double() for x in found], list(exact), rtol=2e-6, atol=5e-8)
    if part != 1 and alpha == 0:
        exact = run("reference", student.double(), None, target, part, alpha=0.0, label_smoothing=0.2)
        found = run("cuda", student, None, target, part, alpha=0.0, label_smoothing=0.2)
        torch.testing.assert_close([x.double() for x in found], list(exact), rtol=2e-6, atol=5e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [(0, 0), (1, 1), (3, 5), (0, 7)])
def test_rows_that_begin_anywhere(dtype: torch.dtype, offset: tuple[int, int]) -> None:
    """Rows whose addresses are no multiple of 16 bytes, alike in both tensors and not, read nothing beside them."""
    student, teacher, target = make(6, 1101, dtype)
    wide = [torch.full((6, 1120), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    for tensor, part, at in zip(wide, (student, teacher), offset, strict=True):
        tensor[:, at : at + 1101] = part
    expected = run("cuda", student, teacher, target, temperature=2.0, label_smoothing=0.1)
    found = run("cuda", *(w[:, at : at + 1101] for w, at in zip(wide, offset, strict=True)), target.int(), temperature=2.0, label_smoothing=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 2e-6, atol=1e-8)
    every = run("cuda", student[::2], teacher[::2], target[::2])
    torch.testing.assert_close(every, run("cuda", student[::2].clone(), teacher[::2].clone(), target[::2].clone()), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_ignored_rows_are_not_read(dtype: torch.dtype, name: str) -> None:
    student, teacher, target = make(11, 40, dtype)
    expected = run("cuda", student, teacher, target, divergence=name, label_smoothing=0.1)
    student[target == -100] = float("nan")
    teacher[target == -100] = INF
    found = run("cuda", student, teacher, target, divergence=name, label_smoothing=0.1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[1][target == -100].any()
    target.fill_(-100)
    loss, grad = run("cuda", student, teacher, target, divergence=name)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_masked_vocabulary(name: str, temperature: float) -> None:
    """Entries of -inf in both sides are as if they were not there, even where all of a thread's are, before others and behind them."""
    student, teacher, target = make(4, 90)
    options: dict[str, Any] = {"divergence": name, "temperature": temperature, "label_smoothing": 0.1}
    expected = run("reference", student.double(), teacher.double(), target, **options)
    padded = [torch.nn.functional.pad(x, (5000, 3000), value=-INF) for x in (student, teacher)]
    loss, grad = run("cuda", *padded, torch.where(target == -100, target, target + 5000), **options)
    assert loss.item() == pytest.approx(expected[0].item(), rel=2e-6)
    torch.testing.assert_close(grad[:, 5000:5090].double(), expected[1], rtol=1e-4, atol=1e-7)
    assert not grad[:, :5000].any() and not grad[:, 5090:].any()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_masked_on_one_side_only(name: str, who: str) -> None:
    student, teacher, target = make(6, 50)
    target.clamp_(max=48)
    target[0] = 1
    (student if who == "student" else teacher)[:, 49] = -INF
    exact = ops.kd_loss(student.double(), teacher.double(), target, divergence=name, return_parts=True)[1].item()
    with ops.use("cuda"):
        found = ops.kd_loss(student, teacher, target, divergence=name, return_parts=True)[1].item()
    assert found == pytest.approx(exact, rel=2e-6)
    assert (found == INF) == ((name, who) in (("forward_kl", "student"), ("reverse_kl", "teacher")))


def test_extreme_logits() -> None:
    for scale in (1e4, 3e38):
        student = torch.tensor([[scale, 0.0, -scale, *[-scale] * 18]], device=DEVICE)
        for name in DIVERGENCES:
            loss, grad = run("cuda", student, student.clone(), torch.tensor([0], device=DEVICE), part=1, divergence=name)
            assert loss.item() == pytest.approx(0, abs=1e-6) and grad.abs().max() < 1e-6
    loss, grad = run("cuda", torch.tensor([[0.0, float("nan"), 1.0]], device=DEVICE), torch.zeros(1, 3, device=DEVICE), torch.tensor([0], device=DEVICE))
    assert loss.isnan() and grad.isnan().any()


def test_a_row_is_the_same_in_any_batch_and_run() -> None:
    student, teacher, target = make(33, 776, torch.bfloat16)
    options: dict[str, Any] = {"temperature": 2.0, "normalizer": 8.0}
    whole = run("cuda", student, teacher, target, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole, run("cuda", student, teacher, target, **options), strict=True))
    for rows in (slice(3, 4), slice(10, 31)):
        assert torch.equal(run("cuda", student[rows], teacher[rows], target[rows], **options)[1], whole[1][rows])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_any_order_of_the_threads(emulated: ModuleType | None, name: str) -> None:
    if emulated is None:
        pytest.skip("the device orders its threads as it likes")
    arguments = make(5, 3001)
    found = [run("cuda", *arguments, divergence=name, temperature=2.0, label_smoothing=0.1) for _ in cuda_on_cpu.orders(emulated)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_in_place_is_out_of_place(emulated: ModuleType | None, dtype: torch.dtype, name: str) -> None:
    """In whatever order the threads run, and whatever rows begin at; an incoming gradient of 1/2 comes on top."""
    for vocabulary in (3, 1101):
        student, teacher, target = make(6, vocabulary, dtype)
        student[target == -100] = float("nan")
        expected = run("cuda", student, teacher, target, divergence=name)
        for _ in cuda_on_cpu.orders(emulated) if emulated is not None else (0,):
            leaf = student.clone().requires_grad_()
            with ops.use("cuda"):
                logits = leaf * 1
                loss = ops.kd_loss(logits, teacher, target, divergence=name, in_place=True)
                assert torch.equal(loss, expected[0]) and torch.equal(logits, expected[1])
                assert torch.equal(torch.autograd.grad(loss * 0.5, leaf)[0], expected[1] * 0.5)


def test_empty_and_wrong_targets() -> None:
    nothing = torch.empty(0, 9, device=DEVICE)
    loss, grad = run("cuda", nothing, nothing, torch.empty(0, dtype=torch.int64, device=DEVICE))
    assert loss == 0 and grad.shape == (0, 9)
    with ops.use("cuda"):
        assert ops.kd_loss(torch.zeros(1, 9, device=DEVICE), torch.zeros(1, 9, device=DEVICE), torch.tensor([9], device=DEVICE)).isnan()


def test_backward_twice_and_poisoned_memory() -> None:
    student, teacher, target = make(20, 512)
    student.requires_grad_()
    with ops.use("cuda"):
        loss = ops.kd_loss(student, teacher, target)
        (first,) = torch.autograd.grad(loss, student, retain_graph=True)
        kept = first.clone()
        first.fill_(float("nan"))
        del first
        (second,) = torch.autograd.grad(loss * 2, student)
    assert torch.equal(second, kept * 2)


def test_in_place_of_contiguous_logits_only() -> None:
    student, teacher, target = make(6, 40)
    chosen = {e.backend: e for e in ops.explain("kd_loss_in_place", student[:, :30], teacher[:, :30], target)}
    assert any("contiguous logits only" in reason for reason in chosen["cuda"].reasons)


def test_what_is_declined() -> None:
    student, teacher, target = make(3, 5)
    reasons = {e.backend: e.reasons for e in ops.explain("kd_loss", student, teacher, target)}["cuda"]
    assert reasons == ("cuda: not yet measured on this device class; ops.use('cuda') selects it",)
    with ops.use("cuda", "reference"):
        explained = {e.backend: e for e in ops.explain("kd_loss", student, teacher.bfloat16(), target)}
        assert explained["cuda"].reasons == ("cuda: teacher is torch.bfloat16, not torch.float32 as the student",)
        assert not {e.backend: e for e in ops.explain("kd_loss", student.double(), teacher.double(), target)}["cuda"].chosen
        assert {e.backend: e for e in ops.explain("kd_loss", student, teacher, target)}["cuda"].chosen
