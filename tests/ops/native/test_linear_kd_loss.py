"""linear_kd_loss on the CPU library, at every level of this machine, against the float64 reference and beside the reference of the same dtype."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from new_process import said
from torch import Tensor

from cvmk import ops
from cvmk.ops import native
from cvmk.ops.kd_loss import DIVERGENCES

from .test_kd_loss import AVAILABLE, ROUNDING, largest_terms, level

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library is not there")
DTYPES = list(ROUNDING)
__all__ = ["level"]  # a fixture
Case = tuple[Tensor, ...]


def make(rows: int, vocabulary: int, width: int, teacher_width: int, bias: bool = True, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Case:
    """hidden, weight, bias, teacher's hidden, weight, bias, target."""
    g = torch.Generator().manual_seed(seed)
    sides = []
    for d in (width, teacher_width):
        hidden, weight = torch.randn(rows, d, generator=g), torch.randn(vocabulary, d, generator=g) * 3 * d**-0.5
        sides += [hidden.to(dtype), weight.to(dtype), torch.randn(vocabulary, generator=g).to(dtype) * float(bias)]
    target = torch.randint(vocabulary, (rows,), generator=g)
    target[1::4] = -100
    return *sides, target


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


SHAPES = [(5, 7, 3, 9), (33, 300, 40, 64), (70, 1000, 128, 96), (130, 2500, 64, 64), (1, 256, 32, 32), (1100, 130, 36, 8), (70, 270, 200, 520)]


def check_two_baselines(case: Case, **options: Any) -> None:
    """At every level the greatest error against float64 of the same values: at most twice (loss) or thrice (gradients) that of the reference
    of the same dtype. Where few numbers are compared the reference's may be nothing by luck, so one rounding of the result is free; of the
    loss also one of the magnitudes that it is a difference of: logits and log-sum-exps; of the gradients of a small vocabulary, but in
    bfloat16, also one of the largest term of their sums."""
    exact, reference = (run("reference", case, double=double, **options) for double in (True, False))
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target = (x.double() for x in case)
    student, teacher = hidden @ weight.t() + bias, teacher_hidden @ teacher_weight.t() + teacher_bias
    temperature = options["temperature"]
    terms = 2 * (temperature / 2 * (student.abs().max() + teacher.abs().max()) + student.abs().max() / 2) + temperature**2 * math.log(weight.shape[0])
    small = weight.shape[0] < 300 and case[0].dtype != torch.bfloat16
    few = largest_terms(student, teacher, case[6], temperature)[1].max() / (target != -100).sum() if small else target.new_zeros(())
    floors = [2.0**-24 * (exact[0].abs() + terms)]  # a log-sum-exp is at most logit + log V
    for right, other in zip(exact[1:], (weight, hidden, torch.ones(1)), strict=True):
        floors.append(ROUNDING[case[0].dtype] * right.abs().max() + 2.0**-24 * few * other.abs().max())
    for name in AVAILABLE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CVMK_CPU_ISA", name)
            found = run("native", case, **options)
        for i, (ours, theirs, right) in enumerate(zip(found, reference, exact, strict=True)):
            errors = [(value.double() - right).abs().max().item() for value in (ours, theirs)]
            assert ours.dtype == theirs.dtype
            assert errors[0] <= (3 if i else 2) * errors[1] + float(floors[i]), (name, i)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(("shape", "dtype"), [*itertools.product(SHAPES, DTYPES[:2]), (SHAPES[1], torch.float16)])
def test_two_baselines(name: str, temperature: float, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    case = make(*shape, seed=SHAPES.index(shape), dtype=dtype)
    check_two_baselines(case, temperature=temperature, divergence=name, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(250, 20000, 12, 8), (10, 50000, 8, 8)])
@pytest.mark.parametrize("name", ["forward_kl", "js"])
def test_large_vocabularies(shape: tuple[int, int, int, int], dtype: torch.dtype, name: str) -> None:
    """Chunks of few rows whose logits are kept, and a vocabulary too large for that."""
    check_two_baselines(make(*shape, dtype=dtype), temperature=2.0, divergence=name)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_parts(level: str, part: int, temperature: float) -> None:
    case = make(40, 300, 48, 32)
    exact, found = (run(backend, case, part, double, temperature=temperature, alpha=0.3) for backend, double in (("reference", True), ("native", False)))
    assert found[0].item() == pytest.approx(exact[0].item(), rel=3e-6)
    for value, right in zip(found[1:], exact[1:], strict=True):
        assert (value.double() - right).abs().max() <= 0.02 * right.abs().max()


def test_agrees_with_kd_loss_and_without_a_teacher(level: str) -> None:
    hidden, weight, _, teacher_hidden, teacher_weight, _, target = make(50, 700, 64, 32, bias=False)
    with ops.use("native"):
        found = ops.linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, target, temperature=2.0)
        alone = ops.linear_kd_loss(hidden, weight, None, None, target, alpha=0.0, label_smoothing=0.1)
    z, t = hidden.double() @ weight.double().t(), teacher_hidden.double() @ teacher_weight.double().t()
    assert found.item() == pytest.approx(ops.kd_loss(z, t, target, temperature=2.0).item(), rel=3e-6)
    assert alone.item() == pytest.approx(ops.kd_loss(z, None, target, alpha=0.0, label_smoothing=0.1).item(), rel=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_are_not_read_and_strides(level: str, dtype: torch.dtype) -> None:
    hidden, weight, _, teacher_hidden, teacher_weight, _, target = make(37, 300, 64, 64, dtype=dtype)
    ignored = target == -100

    def both(h: Tensor, w: Tensor, th: Tensor) -> list[Tensor]:
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        with ops.use("native"):
            loss = ops.linear_kd_loss(h, w, th, teacher_weight, target)
            return [loss.detach(), *torch.autograd.grad(loss, (h, w))]

    expected = both(hidden, weight, teacher_hidden)
    assert not expected[1][ignored].any() and expected[1][~ignored].any()
    poisoned, poisoned_teacher = hidden.clone(), teacher_hidden.clone()
    poisoned[ignored] = float("nan")
    poisoned_teacher[ignored] = float("inf")
    for found in (
        both(poisoned, weight, poisoned_teacher),
        both(torch.cat([torch.full_like(hidden, float("nan")), hidden], 1)[:, 64:], torch.cat([weight, weight * float("nan")], 1)[:, :64], teacher_hidden),
        both(hidden.t().contiguous().t(), weight, teacher_hidden),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["forward_kl", "skew_kl"])
def test_a_row_is_the_same_in_any_batch_and_run(level: str, dtype: torch.dtype, name: str) -> None:
    """Also beside a row whose logits overflow, and whose exponentials must be made with care."""
    case = make(1100, 520, 64, 64, dtype=dtype)
    case[0][1021] = 1000.0
    options: dict[str, Any] = {"normalizer": 9.0, "divergence": name, "temperature": 2.0}
    whole = run("native", case, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole, run("native", case, **options), strict=True))
    for rows in (slice(2, 3), slice(1022, 1100)):
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target = case
        part = (hidden[rows], weight, bias, teacher_hidden[rows], teacher_weight, teacher_bias, target[rows])
        assert torch.equal(run("native", part, **options)[1], whole[1][rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads(level: str, dtype: torch.dtype) -> None:
    case, threads = make(300, 6000, 40, 24, dtype=dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run("native", case, temperature=2.0)
        torch.set_num_threads(3)
        together = run("native", case, temperature=2.0)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_results_are_written_whole(level: str) -> None:
    """Fresh tensors hold NaN before."""
    expected = [run("native", make(37, 300, 40, 24, dtype=dtype)) for dtype in DTYPES]
    torch.use_deterministic_algorithms(True)
    try:
        found = [run("native", make(37, 300, 40, 24, dtype=dtype)) for dtype in DTYPES]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for left, right in zip(found, expected, strict=True) for a, b in zip(left, right, strict=True))


def test_types_of_student_and_teacher_may_differ(level: str) -> None:
    case = make(40, 300, 48, 32)
    mixed = (*(x.float() for x in case[:3]), *case[3:])
    exact, found = (run(backend, mixed, double=double, temperature=2.0) for backend, double in (("reference", True), ("native", False)))
    for value, right in zip(found, exact, strict=True):
        assert (value.double() - right).abs().max() <= 3e-6 * right.abs().max()


def test_nothing_to_learn_from(level: str) -> None:
    *tensors, target = make(6, 40, 8, 8)
    for found in (run("native", (*tensors, target.fill_(-100))), run("native", (*[x[:0] if i % 3 == 0 else x for i, x in enumerate(tensors)], target[:0]))):
        assert not any(x.any() for x in found)


def test_frozen_operands_and_backward_twice(level: str) -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight, _, target = make(20, 90, 16, 16)
    for leaf in range(3):
        tensors = [hidden.detach(), weight.detach(), bias.detach()]
        tensors[leaf].requires_grad_()
        with ops.use("native"):
            loss = ops.linear_kd_loss(tensors[0], tensors[1], teacher_hidden, teacher_weight, target, student_bias=tensors[2])
            (first,) = torch.autograd.grad(loss, tensors[leaf], retain_graph=True)
            (second,) = torch.autograd.grad(loss * 2, tensors[leaf])
        assert torch.equal(second, first * 2) and first.any()


def test_masked_vocabulary(level: str) -> None:
    """A bias of -inf on both sides takes entries out."""
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target = make(30, 300, 32, 32)
    target = target.clamp(max=199)
    target[::3] = -100
    short = (hidden, weight[:200], bias[:200], teacher_hidden, teacher_weight[:200], teacher_bias[:200], target)
    bias[200:] = teacher_bias[200:] = -float("inf")
    for name in DIVERGENCES:
        full = run("native", (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target), divergence=name, label_smoothing=0.1)
        expected = run("reference", short, double=True, divergence=name, label_smoothing=0.1)
        assert full[0].item() == pytest.approx(expected[0].item(), rel=3e-6)
        assert (full[1].double() - expected[1]).abs().max() <= 0.02 * expected[1].abs().max()
        assert not full[2][200:].any() and not full[3][200:].any()


def test_what_is_declined() -> None:
    hidden, weight, _, teacher_hidden, teacher_weight, _, target = make(3, 5, 8, 8)
    found = {e.backend: e for e in ops.explain("linear_kd_loss", hidden.float(), weight.float(), teacher_hidden, teacher_weight, target)}
    assert found["native"].chosen
    found = {e.backend: e for e in ops.explain("linear_kd_loss", hidden, weight, teacher_hidden.double(), teacher_weight.double(), target)}
    assert "teacher_weight is torch.float64" in found["native"].reasons[0] and found["reference"].chosen


_MEMORY = """
import sys, torch
from cvmk import ops
from resident_memory import growth
n, v, d, dtype = 2048, 16000, 128, getattr(torch, sys.argv[1])
h, w = torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(v, d).to(dtype).requires_grad_()
th, tw, y = h.detach().clone(), w.detach().clone(), torch.randint(v, (n,))
ops.linear_kd_loss(h[:64], w, th[:64], tw, y[:64]).backward()
h.grad = w.grad = None
print(growth(lambda: ops.linear_kd_loss(h, w, th, tw, y, temperature=2.0).backward()))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory(dtype: str) -> None:
    """The logits would be 2 x 131 MB; all that grows is under 40 MiB."""
    assert int(said(_MEMORY, dtype)) < 40 << 20


# -- autocast ------------------------------------------------------------------------------------------------------------------------
def under_autocast(case: Case, needs: tuple[bool, ...] = (True, True, True), biases: bool = True, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss and the student's operands, of which `needs` says which ask for a gradient."""
    *tensors, target = case
    leaves = [x.detach().requires_grad_(need) for x, need in zip(tensors[:3], needs, strict=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_kd_loss(
            leaves[0],
            leaves[1],
            tensors[3],
            tensors[4],
            target,
            student_bias=leaves[2] if biases else None,
            teacher_bias=tensors[5] if biases else None,
            **options,
        )
    return loss, leaves


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_keeps_the_gradients_in_float32(shape: tuple[int, ...], level: str) -> None:
    """Operands are rounded as they are by hand; the gradients are those by hand before they were rounded to bfloat16."""
    case = make(*shape, dtype=torch.float32)
    loss, leaves = under_autocast(case, temperature=2.0, label_smoothing=0.1)
    found = torch.autograd.grad(loss * 3, leaves)
    by_hand = [x.bfloat16() for x in case[:6]]
    students = [x.requires_grad_() for x in by_hand[:3]]
    expected = ops.linear_kd_loss(
        students[0], students[1], by_hand[3], by_hand[4], case[6], student_bias=students[2], teacher_bias=by_hand[5], temperature=2.0, label_smoothing=0.1
    )
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    for ours, theirs in zip(found, torch.autograd.grad(expected * 3, students), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours.bfloat16(), theirs)
        assert shape[0] < 2 or not torch.equal(ours, theirs.float())


def test_autocast_again_and_derivatives_of_gradients() -> None:
    case = make(40, 300, 64, 32, dtype=torch.float32)
    loss, leaves = under_autocast(case)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for ours, theirs in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert theirs.dtype == torch.float32 and torch.equal(ours.bfloat16(), theirs.bfloat16())
    loss, leaves = under_autocast(case)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    exact = [x.bfloat16().double() for x in case[:6]]
    students = [x.requires_grad_() for x in exact[:3]]
    with ops.use("reference"):
        value = ops.linear_kd_loss(students[0], students[1], exact[3], exact[4], case[6], student_bias=students[2], teacher_bias=exact[5])
        wanted = torch.autograd.grad(sum(g.square().sum() for g in torch.autograd.grad(value, students, create_graph=True)), students)
    for ours, right in zip(second, wanted, strict=True):
        assert (ours.double() - right).abs().max() < 0.05 * right.abs().max()


def test_autocast_takes_what_the_op_takes() -> None:
    case = make(40, 300, 64, 32, dtype=torch.float32)
    full, leaves = under_autocast(case)
    gradients = torch.autograd.grad(full, leaves)
    for needs in itertools.product((False, True), repeat=3):
        loss, leaves = under_autocast(case, needs)
        assert torch.equal(loss, full) and loss.requires_grad == any(needs)
        if any(needs):
            loss.backward()
        for leaf, gradient, need in zip(leaves, gradients, needs, strict=True):
            assert torch.equal(leaf.grad, gradient) if need else leaf.grad is None
    hidden = case[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="student_weight"):
        ops.linear_kd_loss(hidden, case[1][:, 1:], case[3], case[4], case[6])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        without = ops.linear_kd_loss(hidden, case[1], None, None, case[6], alpha=0.0)
        shared = ops.linear_kd_loss(hidden[:, :32], case[1][:, :32], hidden[:, :32], case[1][:, :32], case[6], normalizer=7.0)
    (gradient,) = torch.autograd.grad(without + shared, hidden)
    assert gradient.shape == hidden.shape and bool(gradient.isfinite().all())
    loss, leaves = under_autocast(case, biases=False)
    torch.autograd.grad(loss, leaves[:2])
