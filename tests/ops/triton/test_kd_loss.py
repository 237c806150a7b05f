"""kd_loss in Triton (interpreted where there is no GPU) against the float64 reference and beside the reference of the same dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cvmk import ops
from cvmk.ops import triton
from cvmk.ops.kd_loss import DIVERGENCES, Call
from cvmk.ops.triton import _tuning
from cvmk.ops.triton.kd_loss import GRADIENT, ROWS, key, launch_rows, launch_total

pytestmark = [
    pytest.mark.skipif(triton.reason() is not None, reason=f"{triton.reason()}"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles and blocks in a short row."""

    def small(tuned: _tuning.Tuned, key: str, device: torch.device) -> _tuning.Config:
        return {"PER_THREAD": 8, "num_warps": 1, "num_stages": 1} if tuned is ROWS else {"BLOCK": 256, "num_warps": 1, "num_stages": 1}

    with monkeypatch.context() as patch:
        patch.setattr(_tuning.Tuned, "config", small)
        yield


def make(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, vocabulary, generator=g).mul_(3).to(dtype).to(DEVICE) for _ in range(2))
    target = torch.randint(vocabulary, (rows,), generator=g)
    target[::5] = -100
    return student, teacher, target.to(DEVICE)


def run(backend: str, student: Tensor, teacher: Tensor | None, target: Tensor, part: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    with ops.use(backend):
        value = ops.kd_loss(student, teacher, target, return_parts=True, **options)[part]
        (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 1.0), (torch.float32, 3.0), (torch.bfloat16, 2.0), (torch.float16, 1.0)])
def test_two_baselines(dtype: torch.dtype, name: str, temperature: float) -> None:
    """Root-mean-square error against float64 of the same values: at most that of the reference of the same dtype, twice (loss) or thrice."""
    errors: dict[str, list[Tensor]] = {"triton": [], "reference": []}
    losses: dict[str, float] = {"triton": 0.0, "reference": 0.0}
    for vocabulary in (3, 640, 1051):
        student, teacher, target = make(3, vocabulary, dtype, seed=vocabulary)
        options: dict[str, Any] = {"temperature": temperature, "divergence": name, "label_smoothing": 0.1}
        exact = run("reference", student.double(), teacher.double(), target, **options)
        for backend in errors:
            loss, grad = run(backend, student, teacher, target, **options)
            assert loss.dtype == torch.float32 and grad.dtype == dtype
            losses[backend] += ((loss.double() - exact[0]) / exact[0]).item() ** 2
            errors[backend].append((grad.double() - exact[1]).flatten() / exact[1].abs().max())
    ours, theirs = (torch.cat(errors[backend]).square().mean().sqrt() for backend in ("triton", "reference"))
    assert ours <= 3 * theirs + 3e-8
    assert losses["triton"] ** 0.5 <= 2 * losses["reference"] ** 0.5 + 3e-7


@pytest.mark.parametrize("part", [0, 1, 2])
def test_parts_and_no_teacher(part: int) -> None:
    student, teacher, target = make(5, 70)
    for temperature in (1.0, 2.0, 0.7):
        exact = run("reference", student.double(), teacher.double(), target, part, temperature=temperature, alpha=0.3)
        found = run("triton", student, teacher, target, part, temperature=temperature, alpha=0.3)
        torch.testing.assert_close([x.double() for x in found], list(exact), rtol=3e-6, atol=5e-8)
    if part != 1:
        exact = run("reference", student.double(), None, target, part, alpha=0.0, label_smoothing=0.2)
        found = run("triton", student, None, target, part, alpha=0.0, label_smoothing=0.2)
        torch.testing.assert_close([x.double() for x in found], list(exact), rtol=3e-6, atol=5e-8)


def test_gradients_of_all_outputs_add_up() -> None:
    student, teacher, target = make(5, 300)
    options: dict[str, Any] = {"temperature": 2.0, "alpha": 0.3, "return_parts": True}

    def mixed(backend: str, *tensors: Tensor) -> Tensor:
        z = tensors[0].detach().requires_grad_()
        with ops.use(backend):
            loss, kd, ce = ops.kd_loss(z, tensors[1], target, **options)
            return torch.autograd.grad(2 * loss - 3 * kd + 5 * ce, z)[0]

    torch.testing.assert_close(mixed("triton", student, teacher).double(), mixed("reference", student.double(), teacher.double()), rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_part_without_weight_does_not_count_even_where_it_is_infinite(alpha: float) -> None:
    student, teacher, target = make(4, 40)
    target = torch.tensor([1, 2, 3, -100], device=DEVICE)
    if alpha == 0:
        student[0, 7] = -INF
    else:
        student[0, 1], teacher[0, 1] = -INF, -INF
    loss, grad = run("triton", student, teacher, target, alpha=alpha)
    expected = run("reference", student.double(), teacher.double(), target, alpha=alpha)
    assert loss.isfinite() and loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-4, atol=1e-7)


def test_types_may_differ_and_strides() -> None:
    student, teacher, target = make(6, 272)
    wide = torch.full((6, 400), float("nan"), device=DEVICE)
    wide[:, 7:279] = student
    expected = run("triton", student, teacher.bfloat16().float(), target, temperature=2.0)
    found = run("triton", wide[:, 7:279], teacher.bfloat16(), target.int(), temperature=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    every = run("triton", student[::2], teacher[::2], target[::2])
    torch.testing.assert_close(every, run("triton", student[::2].contiguous(), teacher[::2].contiguous(), target[::2].contiguous()), rtol=0, atol=0)
    cube = run("triton", student.view(2, 3, 272), teacher.view(2, 3, 272), target.view(2, 3))
    assert torch.equal(cube[1].view(6, 272), run("triton", student, teacher, target)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_ignored_rows_are_not_read(dtype: torch.dtype, name: str) -> None:
    student, teacher, target = make(3, 300, dtype)
    expected = run("triton", student, teacher, target, divergence=name, label_smoothing=0.1)
    student[target == -100] = float("nan")
    teacher[target == -100] = INF
    found = run("triton", student, teacher, target, divergence=name, label_smoothing=0.1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[1][target == -100].any()
    target.fill_(-100)
    loss, grad = run("triton", student, teacher, target, divergence=name)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_in_place_is_out_of_place(dtype: torch.dtype, name: str) -> None:
    """Over rows at any distance, next to which nothing is written; rows that do not count become 0."""
    student, teacher, target = make(3, 300, dtype)
    student[target == -100] = float("nan")
    for options in ({"normalizer": 3.0, "label_smoothing": 0.1}, {"temperature": 2.0, "alpha": 1.0}):
        expected = run("triton", student, teacher, target, divergence=name, **options)
        wide = torch.full((3, 320), 7.0, dtype=dtype, device=DEVICE).requires_grad_() * 1
        rows = wide[:, 7:307]
        with torch.no_grad():
            rows.copy_(student)
        with ops.use("triton"):
            loss = ops.kd_loss(rows, teacher, target, divergence=name, in_place=True, **options)
        assert torch.equal(loss, expected[0])
        assert (wide[:, :7] == 7).all() and (wide[:, 307:] == 7).all()
        torch.testing.assert_close(rows.detach(), expected[1], rtol=0 if DEVICE == "cpu" else 1e-5, atol=0 if DEVICE == "cpu" else 1e-7)
        loss.backward()


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.3])
def test_in_place_with_an_incoming_gradient(factor: float) -> None:
    student, teacher, target = make(4, 300)
    found = []
    for in_place in (False, True):
        leaf = student.clone().requires_grad_()
        with ops.use("triton"):
            found.append(torch.autograd.grad(ops.kd_loss(leaf * 1, teacher, target, in_place=in_place) * factor, leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-6 if factor == 0.3 or DEVICE == "cuda" else 0, atol=1e-9 if factor == 0.3 or DEVICE == "cuda" else 0)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_masked_vocabulary(name: str, temperature: float) -> None:
    """Entries of -inf in both sides are as if they were not there, even where whole tiles of a row are."""
    student, teacher, target = make(2, 90)
    student[:, 80:] = teacher[:, 80:] = -INF
    target = target.clamp(max=79)
    wide_student, wide_teacher = (torch.nn.functional.pad(x, (200, 310), value=-INF) for x in (student, teacher))
    options: dict[str, Any] = {"divergence": name, "temperature": temperature, "label_smoothing": 0.1}
    expected = run("reference", student[:, :80].double(), teacher[:, :80].double(), target, **options)
    loss, grad = run("triton", wide_student, wide_teacher, torch.where(target >= 0, target + 200, target), **options)
    assert loss.item() == pytest.approx(expected[0].item(), rel=3e-6)
    torch.testing.assert_close(grad[:, 200:280].double(), expected[1], rtol=1e-4, atol=1e-7)
    assert not grad[:, :200].any() and not grad[:, 280:].any()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_masked_on_one_side_only(name: str, who: str) -> None:
    student, teacher, target = make(3, 50)
    target.clamp_(max=48)
    target[0] = 1
    (student if who == "student" else teacher)[:, 49] = -INF
    with ops.use("reference"):
        exact = ops.kd_loss(student.double(), teacher.double(), target, divergence=name, return_parts=True)[1].item()
    with ops.use("triton"):
        found = ops.kd_loss(student, teacher, target, divergence=name, return_parts=True)[1].item()
    assert found == pytest.approx(exact, rel=3e-6)
    assert (found == INF) == ((name, who) in (("forward_kl", "student"), ("reverse_kl", "teacher")))


def test_extreme_logits() -> None:
    for scale in (1e4, 3e38):
        student = torch.tensor([[scale, 0.0, -scale, *[-scale] * 18]], device=DEVICE)
        for name in DIVERGENCES:
            loss, grad = run("triton", student, student.clone(), torch.tensor([0], device=DEVICE), part=1, divergence=name)
            assert loss.item() == pytest.approx(0, abs=1e-6) and grad.abs().max() < 1e-6
    for name in DIVERGENCES:
        student = torch.tensor([[0.0, float("nan"), 1.0]], device=DEVICE)
        loss, grad = run("triton", student, torch.zeros(1, 3, device=DEVICE), torch.tensor([0], device=DEVICE), divergence=name)
        assert loss.isnan() and grad.isnan().any()


def test_a_row_is_the_same_in_any_batch_and_run() -> None:
    student, teacher, target = make(5, 777, torch.bfloat16)
    options: dict[str, Any] = {"temperature": 2.0, "normalizer": 8.0}
    whole = run("triton", student, teacher, target, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole, run("triton", student, teacher, target, **options), strict=True))
    for rows in (slice(3, 4), slice(2, 5)):
        assert torch.equal(run("triton", student[rows], teacher[rows], target[rows], **options)[1], whole[1][rows])


def test_normalizer() -> None:
    student, teacher, target = make(7, 5)
    for normalizer in (None, 3.0, torch.tensor([7.0], device=DEVICE)):
        with ops.use("triton"):
            found = ops.kd_loss(student, teacher, target, normalizer=normalizer)
        with ops.use("reference"):
            exact = ops.kd_loss(student.double(), teacher.double(), target, normalizer=normalizer)
        assert found.item() == pytest.approx(exact.item(), rel=2e-6)


def test_sum_of_more_rows_than_a_block() -> None:
    losses = torch.rand(2, 2500, device=DEVICE)
    target = torch.arange(2500, device=DEVICE) % 3
    kd, ce = losses.double().sum(1) / 1667
    for alpha in (0.0, 0.25, 1.0):
        found = launch_total(losses, target, None, Call(losses, None, target, None, 2.0, alpha, "forward_kl", 0.0, 0.0, 2))
        expected = [alpha * 4 * kd + (1 - alpha) * ce, 4 * kd, ce, 1667]
        assert [x.item() for x in found] == pytest.approx([float(x) for x in expected], rel=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_in_one_launch_over_the_logits(name: str) -> None:
    """`kd_rows` with a gradient, written over the student's logits: that of the loss by itself, before the normaliser."""
    student, teacher, target = make(4, 700)
    options: dict[str, Any] = {"temperature": 2.0, "alpha": 0.3, "divergence": name, "label_smoothing": 0.1}
    expected = run("reference", student.double(), teacher.double(), target, normalizer=1.0, **options)[1]
    stats, losses = torch.full((5, 4), float("nan"), device=DEVICE), torch.full((2, 4), float("nan"), device=DEVICE)
    call = Call(student, teacher, target, None, 2.0, 0.3, name, DIVERGENCES[name], 0.1, -100)
    launch_rows(student, teacher, (None, None), target, stats, losses, call, gradient=student)
    torch.testing.assert_close(student.double(), expected, rtol=3e-5, atol=3e-7)
    assert losses.isfinite().all() and stats.isfinite().all()


def test_empty_and_wrong_targets() -> None:
    loss, grad = run("triton", *(torch.empty(0, 9, device=DEVICE) for _ in range(2)), torch.empty(0, dtype=torch.int64, device=DEVICE))
    assert loss == 0 and grad.shape == (0, 9)
    with ops.use("triton"):
        assert ops.kd_loss(torch.zeros(1, 9, device=DEVICE), torch.zeros(1, 9, device=DEVICE), torch.tensor([9], device=DEVICE)).isnan()


def test_backward_twice() -> None:
    student, teacher, target = make(5, 512)
    student.requires_grad_()
    with ops.use("triton"):
        loss = ops.kd_loss(student, teacher, target)
        (first,) = torch.autograd.grad(loss, student, retain_graph=True)
        kept = first.clone()
        first.fill_(float("nan"))
        del first
        (second,) = torch.autograd.grad(loss * 2, student)
    assert torch.equal(second, kept * 2)


def test_what_is_declined() -> None:
    student, teacher, target = make(3, 5)
    found = {e.backend: e for e in ops.explain("kd_loss", student, teacher.double(), target)}
    assert "teacher is torch.float64" in found["triton"].reasons[0]
    assert not {e.backend: e for e in ops.explain("kd_loss", student.double(), teacher, target)}["triton"].chosen
    found = {e.backend: e for e in ops.explain("kd_loss", student, teacher, target)}
    if DEVICE == "cuda":
        assert not found["triton"].reasons
    else:
        assert "interpreted" in found["triton"].reasons[0]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("sweeps", [1, 2, 3])
def test_block_sizes_of_every_length(capability: tuple[int, int], sweeps: int) -> None:
    """What a GPU runs with, whatever the length of a row: whole vectors a thread, and powers of two."""
    for vocabulary in (1, 31, 1000, 2048, 32000, 256206):
        name = key(torch.bfloat16, vocabulary, sweeps)
        for config in (ROWS.heuristic(name, capability), *ROWS.candidates(name, capability)):
            assert config["PER_THREAD"] % 8 == 0 and config["num_warps"] in (1, 2, 4, 8, 16)
        for config in (GRADIENT.heuristic(name, capability), *GRADIENT.candidates(name, capability)):
            assert config["BLOCK"] >= 32 and config["BLOCK"] & (config["BLOCK"] - 1) == 0
