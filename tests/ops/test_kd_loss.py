"""kd_loss against loops in float64, and against PyTorch's own losses where it has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from cvmk import ops
from cvmk.ops.kd_loss import op, prepare
from cvmk.ops.reference import kd_loss as reference

DIVERGENCES = ["forward_kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl"]
INF = float("inf")


@pytest.fixture(autouse=True)
def the_law() -> Iterator[None]:
    """These are the tests of the reference, whatever other backends this machine has."""
    with ops.use("reference"):
        yield


def make(*rows: int, vocabulary: int = 7, dtype: torch.dtype = torch.float64, ignored: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(*rows, vocabulary, generator=generator, dtype=torch.float64) * 2
    teacher = torch.randn(*rows, vocabulary, generator=generator, dtype=torch.float64) * 2
    target = torch.randint(0, vocabulary, rows, generator=generator)
    target[torch.rand(rows, generator=generator) < ignored] = -100
    return student.to(dtype), teacher.to(dtype), target


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [x / sum(powers) for x in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(0.0 if a == 0 else INF if b == 0 else a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mix(weight: float, p: list[float], q: list[float]) -> list[float]:
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def divergence(name: str, p: list[float], q: list[float], mixture: float | None) -> float:
    weight = mixture if mixture is not None else {"js": 0.5}.get(name, 0.1)
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "js":
        m = mix(weight, p, q)
        return weight * kl(p, m) + (1 - weight) * kl(q, m)
    return kl(p, mix(weight, p, q)) if name == "skew_kl" else kl(q, mix(weight, q, p))


def oracle(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    temperature: float = 1.0,
    name: str = "forward_kl",
    mixture: float | None = None,
    smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[float, float, int]:
    """Sum of T^2 D, sum of the cross-entropies, number of rows that count: numbers and loops only."""
    kd = ce = 0.0
    count = 0
    width = student.shape[-1]
    for i, y in enumerate(target.flatten().tolist()):
        if y == ignore_index:
            continue
        count += 1
        z = student.reshape(-1, width)[i].tolist()
        q = softmax(z)
        present = [v for v in range(width) if z[v] != -INF]
        wanted = [smoothing / len(present) * (v in present) + (1 - smoothing) * (v == y) for v in range(width)]
        ce -= sum(0.0 if a == 0 else -INF if b == 0 else a * math.log(b) for a, b in zip(wanted, q, strict=True))
        if teacher is not None:
            t = teacher.reshape(-1, width)[i].tolist()
            kd += temperature**2 * divergence(name, softmax([x / temperature for x in t]), softmax([x / temperature for x in z]), mixture)
    return kd, ce, count


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "alpha", "smoothing"), [(1.0, 0.5, 0.0), (2.0, 0.3, 0.1), (0.5, 1.0, 0.2), (1.0, 0.0, 0.1)])
def test_value_is_that_of_the_loops(name: str, temperature: float, alpha: float, smoothing: float) -> None:
    student, teacher, target = make(3, 5)
    mixture = 0.3 if name in ("js", "skew_kl") else None
    kd, ce, count = oracle(student, teacher, target, temperature, name, mixture, smoothing)
    loss, kd_part, ce_part = ops.kd_loss(
        student, teacher, target, temperature=temperature, alpha=alpha, divergence=name, mixture=mixture, label_smoothing=smoothing, return_parts=True
    )
    assert kd_part.item() == pytest.approx(kd / count, rel=1e-12)
    assert ce_part.item() == pytest.approx(ce / count, rel=1e-12)
    assert loss.item() == pytest.approx((alpha * kd + (1 - alpha) * ce) / count, rel=1e-12)


def test_defaults_of_the_mixing_weights() -> None:
    student, teacher, target = make(4)
    for name, weight in (("js", 0.5), ("skew_kl", 0.1), ("skew_reverse_kl", 0.1)):
        default = ops.kd_loss(student, teacher, target, divergence=name)
        assert torch.equal(default, ops.kd_loss(student, teacher, target, divergence=name, mixture=weight))
        assert not torch.equal(default, ops.kd_loss(student, teacher, target, divergence=name, mixture=0.7))


def eager(student: Tensor, teacher: Tensor, target: Tensor, temperature: float, alpha: float, smoothing: float) -> Tensor:
    """PyTorch's own losses."""
    counts = target != -100
    rows = F.kl_div(F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1), reduction="none", log_target=True).sum(-1)
    ce = F.cross_entropy(student.flatten(0, -2), target.flatten(), ignore_index=-100, label_smoothing=smoothing)
    return alpha * temperature**2 * (rows * counts).sum() / counts.sum() + (1 - alpha) * ce


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_and_gradient_are_those_of_pytorch(temperature: float) -> None:
    student, teacher, target = make(40, vocabulary=33)
    grads = []
    for function in (
        lambda z: ops.kd_loss(z, teacher, target, temperature=temperature, alpha=0.3, label_smoothing=0.1),
        lambda z: eager(z, teacher, target, temperature, 0.3, 0.1),
    ):
        z = student.clone().requires_grad_()
        loss = function(z)
        (loss * 3).backward()
        grads.append((loss.detach(), z.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "alpha", "smoothing"), [(1.0, 0.4, 0.1), (2.0, 0.4, 0.1), (1.5, 1.0, 0.0), (1.0, 0.0, 0.0)])
def test_first_and_second_derivatives(name: str, temperature: float, alpha: float, smoothing: float) -> None:
    student, teacher, target = make(2, 2, vocabulary=4)
    student.requires_grad_()

    def loss(z: Tensor) -> tuple[Tensor, ...]:
        return ops.kd_loss(
            z, teacher, target, temperature=temperature, alpha=alpha, divergence=name, label_smoothing=smoothing, normalizer=1.7, return_parts=True
        )

    assert gradcheck(loss, (student,))
    assert gradgradcheck(loss, (student,))


def test_gradient_of_each_part_alone() -> None:
    student, teacher, target = make(6)
    for part in range(3):
        assert gradcheck(lambda z, part=part: ops.kd_loss(z, teacher, target, temperature=2.0, return_parts=True)[part], (student.clone().requires_grad_(),))


def test_normalizer() -> None:
    student, teacher, target = make(3, 5)
    count = int((target != -100).sum())
    mean = ops.kd_loss(student, teacher, target)
    for normalizer in (4, 4.0, torch.tensor(4), torch.tensor([4.0]), torch.tensor(4.0, requires_grad=True)):
        torch.testing.assert_close(ops.kd_loss(student, teacher, target, normalizer=normalizer), mean * count / 4)
    halves = sum(ops.kd_loss(student[i], teacher[i], target[i], normalizer=count) for i in range(3))
    torch.testing.assert_close(halves, mean)


def test_nothing_to_learn_from_costs_nothing() -> None:
    student, teacher, target = make(3, 4, ignored=2.0)
    student.requires_grad_()
    loss = ops.kd_loss(student, teacher, target, label_smoothing=0.1)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and not student.grad.any()
    empty = torch.empty(0, 5, 7, requires_grad=True)
    loss = ops.kd_loss(empty, torch.empty(0, 5, 7), torch.empty(0, 5, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and empty.grad is not None and empty.grad.shape == (0, 5, 7)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("poison", [float("nan"), INF])
@pytest.mark.parametrize("on_device", [False, True])
def test_ignored_rows_are_not_read(name: str, poison: float, on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_device:
        blanked(monkeypatch)
    student, teacher, target = make(4, 5, dtype=torch.float32)
    results = []
    for value in (0.0, poison):
        z, t = student.clone(), teacher.clone()
        z[target == -100] = value
        t[target == -100] = value
        z.requires_grad_()
        loss = ops.kd_loss(z, t, target, temperature=2.0, divergence=name, label_smoothing=0.1)
        loss.backward()
        results.append((loss.detach(), z.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[1][0].isfinite() and not results[1][1][target == -100].any()


def blanked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the path of other devices: rows are blanked by a mask, and the masked formulas always run."""

    def chunks(valid: Tensor, size: int) -> list[tuple[slice, Tensor]]:
        return [(slice(i, i + 3), ~valid[i : i + 3].unsqueeze(1)) for i in range(0, valid.shape[0], 3)]

    monkeypatch.setattr(reference, "row_chunks", chunks)
    monkeypatch.setattr(reference, "quick_first", lambda *_: False)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_path_of_other_devices_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, target = make(5, 5)

    def run() -> tuple[Tensor, Tensor]:
        z = student.clone().requires_grad_()
        loss = ops.kd_loss(z, teacher, target, temperature=2.0, divergence=name, label_smoothing=0.1)
        loss.backward()
        assert z.grad is not None
        return loss.detach(), z.grad

    expected = run()
    blanked(monkeypatch)
    torch.testing.assert_close(run(), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_vocabulary(name: str, smoothing: float) -> None:
    """Entries of -inf in both: value and gradient are those of the vocabulary without them, smoothing included."""
    student, teacher, target = make(6, vocabulary=5)
    wide_student, wide_teacher = F.pad(student, (0, 3), value=-INF), F.pad(teacher, (0, 3), value=-INF)
    results = []
    for z, t in ((student, teacher), (wide_student, wide_teacher)):
        z = z.clone().requires_grad_()
        loss = ops.kd_loss(z, t, target, temperature=2.0, divergence=name, label_smoothing=smoothing)
        loss.backward()
        assert z.grad is not None
        results.append((loss.detach(), z.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1][:, :5], rtol=1e-12, atol=1e-15)
    assert not results[1][1][:, 5:].any()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_masked_on_one_side_only(name: str, who: str) -> None:
    student, teacher, target = make(6, vocabulary=5, ignored=0.0)
    target.clamp_(max=3)
    (student if who == "student" else teacher)[:, 4] = -INF
    expected, _, count = oracle(student, teacher, target, name=name)
    student.requires_grad_()
    _, kd, _ = ops.kd_loss(student, teacher, target, divergence=name, label_smoothing=0.1, return_parts=True)
    assert kd.item() == pytest.approx(expected / count, rel=1e-12)
    assert math.isinf(expected) == ((name, who) in (("forward_kl", "student"), ("reverse_kl", "teacher")))
    kd.backward()
    if math.isfinite(expected):
        assert student.grad is not None and student.grad.isfinite().all()


def test_second_derivative_with_a_masked_vocabulary_is_finite() -> None:
    student, teacher, target = make(3, vocabulary=4)
    hole = torch.zeros(5, dtype=torch.bool)
    hole[4] = True

    for name in DIVERGENCES:

        def loss(x: Tensor, name: str = name) -> Tensor:
            z = F.pad(x, (0, 1)).masked_fill(hole, -INF)
            return ops.kd_loss(z, F.pad(teacher, (0, 1), value=-INF), target, divergence=name, label_smoothing=0.1)

        assert gradgradcheck(loss, (student.clone().requires_grad_(),))


def test_masked_target_costs_infinity() -> None:
    student, teacher, target = make(2, vocabulary=3, ignored=0.0)
    student[0, target[0]] = -INF
    assert ops.kd_loss(student, None, target, alpha=0.0).item() == INF
    assert math.isfinite(ops.kd_loss(student, teacher, target, alpha=1.0, divergence="js").item())


def test_large_logits() -> None:
    """Differences of 1e4 in the logits: probabilities underflow, the loss does not."""
    student = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    teacher = torch.tensor([[1e4, 0.0, -1e4]])
    for name in DIVERGENCES:
        loss = ops.kd_loss(student, teacher, torch.tensor([0]), divergence=name)
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.item() == pytest.approx(0, abs=1e-6) and grad.abs().max() < 1e-6
    assert ops.kd_loss(student, None, torch.tensor([2]), alpha=0.0).item() == pytest.approx(2e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_error_of_narrow_types(dtype: torch.dtype, name: str) -> None:
    """The softmax is float32's: against float64 on the same rounded logits the loss is right to 1e-6, the gradient to its rounding."""
    student, teacher, target = make(50, vocabulary=101, dtype=dtype)
    exact = student.double().requires_grad_()
    expected = ops.kd_loss(exact, teacher.double(), target, temperature=2.0, divergence=name, label_smoothing=0.1)
    expected.backward()
    student.requires_grad_()
    loss = ops.kd_loss(student, teacher, target, temperature=2.0, divergence=name, label_smoothing=0.1)
    loss.backward()
    assert loss.dtype == torch.float32 and student.grad is not None and exact.grad is not None and student.grad.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    unit = torch.finfo(dtype).eps
    smallest = 2**-24 if dtype == torch.float16 else 1e-9
    assert ((student.grad.double() - exact.grad).abs() <= exact.grad.abs() * max(unit, 1e-5) + smallest).all()


def test_types_may_differ_and_autocast_changes_nothing() -> None:
    student, teacher, target = make(9, dtype=torch.float32)
    expected = ops.kd_loss(student, teacher.bfloat16().float(), target)
    torch.testing.assert_close(ops.kd_loss(student, teacher.bfloat16(), target.int()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ops.kd_loss(student, teacher.bfloat16(), target), expected)
    assert ops.kd_loss(student.double(), teacher, target).dtype == torch.float64


def test_strides_and_shapes() -> None:
    student, teacher, target = make(3, 6)
    expected = ops.kd_loss(student[:, :-1].contiguous(), teacher[:, 1:].contiguous(), target[:, 1:].contiguous(), label_smoothing=0.1)
    leaf = student.clone().requires_grad_()
    loss = ops.kd_loss(leaf[:, :-1], teacher[:, 1:], target[:, 1:], label_smoothing=0.1)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert leaf.grad is not None and not leaf.grad[:, -1].any()
    torch.testing.assert_close(ops.kd_loss(student[0, 0], teacher[0, 0], torch.tensor(2)), ops.kd_loss(student[:1, 0], teacher[:1, 0], torch.tensor([2])))
    transposed = student.transpose(0, 1)
    torch.testing.assert_close(ops.kd_loss(transposed, teacher.transpose(0, 1), target.t()), ops.kd_loss(student, teacher, target))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for ignored in (0.0, 0.4):
        student, teacher, target = make(23, ignored=ignored)
        grads = []
        for elements in (2**17, 7 * 4, 1):
            monkeypatch.setattr(reference, "CPU_CHUNK", elements)
            z = student.clone().requires_grad_()
            ops.kd_loss(z, teacher, target, temperature=2.0, label_smoothing=0.1).backward()
            grads.append(z.grad)
        assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batched", [False, True])
def test_teacher_gets_no_gradient(batched: bool) -> None:
    """Not of the gradient either; within vmap a tensor does not tell that it asks for one."""
    student, teacher, target = make(4)
    student.requires_grad_()
    teacher.requires_grad_()
    if batched:
        loss = torch.vmap(ops.kd_loss)(student, teacher, target).sum()
    else:
        loss = ops.kd_loss(student, teacher, target)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    grad.square().sum().backward()
    assert student.grad is not None and teacher.grad is None


def test_backward_runs_twice_and_repeats_bit_for_bit() -> None:
    student, teacher, target = make(64, vocabulary=129, dtype=torch.float32)
    student.requires_grad_()
    first: list[Tensor] = []
    for _ in range(3):
        loss = ops.kd_loss(student, teacher, target, temperature=2.0, label_smoothing=0.1)
        for _ in range(2):
            (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
            first = first or [loss.detach(), grad]
            assert torch.equal(loss, first[0]) and torch.equal(grad, first[1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"teacher_logits": torch.zeros(2, 5)}, ValueError, "vocabulary has 5 entries and the student's 4"),
        ({"teacher_logits": torch.zeros(3, 4)}, ValueError, r"\(3, 4\).*\(2, 4\)"),
        ({"teacher_logits": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "teacher_logits must be floating"),
        ({"student_logits": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "student_logits must be floating"),
        ({"student_logits": torch.zeros(2, 0)}, ValueError, "V of at least 1"),
        ({"teacher_logits": None}, ValueError, "without a teacher alpha must be 0"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target has shape \(3,\)"),
        ({"target": torch.zeros(2)}, TypeError, "target must be int64"),
        ({"target": torch.tensor([0, 4])}, ValueError, "target holds 4"),
        ({"target": torch.tensor([-1, 0])}, ValueError, "target holds -1"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": 5e-324}, ValueError, "temperature must be positive and finite, from 9e-302 to 1e\\+06"),
        ({"temperature": 1e39}, ValueError, "temperature must be positive and finite"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index must be an integer of 64 bits"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got 0.5"),
        ({"alpha": 1.5}, ValueError, "alpha"),
        ({"divergence": "kl"}, ValueError, "forward_kl, reverse_kl"),
        ({"mixture": 0.2}, ValueError, "takes no mixture"),
        ({"divergence": "js", "mixture": 1.0}, ValueError, "mixture must lie"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing"),
        ({"normalizer": 0}, ValueError, "normalizer must be positive"),
        ({"normalizer": torch.ones(2)}, ValueError, "one number"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], words: str) -> None:
    arguments: dict[str, object] = {"student_logits": torch.zeros(2, 4), "teacher_logits": torch.zeros(2, 4), "target": torch.tensor([0, 1])}
    with pytest.raises(error, match=words):
        ops.kd_loss(**{**arguments, **change})


def test_explain_and_use() -> None:
    student, teacher, target = make(4)
    found = ops.explain("kd_loss", student, teacher, target, divergence="js")
    assert [row.backend for row in found if row.chosen] == ["reference"]
    with ops.use("reference"):
        assert ops.kd_loss(student, teacher, target).isfinite()
    with ops.use("cuda"), pytest.raises(NotImplementedError, match="kd_loss"):
        ops.kd_loss(student, teacher, target)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [33.0, 1000.0, 1e5, 1e-38, 1e-46, 1e-290])
def test_far_temperatures_keep_their_digits(name: str, temperature: float) -> None:
    """At high ones the divergence falls as 1 / T^2, and float32 sums of terms of size 1 would keep nothing of it; at low ones logits divided by T are
    past float32."""
    student, teacher, target = (x.float() if x.is_floating_point() else x for x in make(6, 50))
    found, expected = [], []
    for to, dtype in ((found, torch.float32), (expected, torch.float64)):
        leaf = student.to(dtype).requires_grad_()
        loss = ops.kd_loss(leaf, teacher.to(dtype), target, temperature=temperature, alpha=1.0, divergence=name)
        hidden, weight = student[..., :8].to(dtype).requires_grad_(), teacher[0, :, :8].to(dtype)
        other = ops.linear_kd_loss(hidden, weight, hidden.detach() * 0.5, weight, target % 4, temperature=temperature, alpha=1.0, divergence=name)
        to += [loss.detach().double(), *(x.double() for x in torch.autograd.grad(loss, leaf)), other.detach().double()]
        to += [x.double() for x in torch.autograd.grad(other, hidden)]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max() + 2**-149  # float32's least step
    reasons = {row.backend: row for row in ops.explain("kd_loss", student, teacher, target, temperature=temperature)}
    assert reasons["reference"].chosen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    student, teacher, target = make(3, 4, dtype=dtype)
    for some_teacher, alpha in ((teacher, 0.5), (None, 0.0)):
        arguments = prepare(student[:, ::2], some_teacher if some_teacher is None else some_teacher[:, ::2], target[:, ::2], alpha=alpha, normalizer=3)
        torch.library.opcheck(torch.ops.cvmk.kd_loss_forward.default, arguments)
        _, _, _, divisor, stats = op(arguments)
        one = torch.ones((), dtype=stats.dtype)
        for grads, needs in (((one, None, None), True), ((one, one, one), True), ((one, None, None), False)):
            backward = (*grads, None, None, *arguments[:4], divisor, stats, *arguments[4:], [needs])
            torch.library.opcheck(torch.ops.cvmk.kd_loss_backward.default, backward)


def loss_of(teacher: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(z: Tensor) -> Tensor:
        return ops.kd_loss(z * 1.5, teacher, target, temperature=2.0, divergence="js", label_smoothing=0.1, normalizer=target.numel())

    return loss


# -- in place of the student's logits ------------------------------------------------------------------------------------------------
def both_ways(student: Tensor, teacher: Tensor | None, target: Tensor, factor: float = 1.0, **options: object) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient out of place and in place."""
    found = []
    for in_place in (False, True):
        leaf = student.clone().requires_grad_()
        loss = ops.kd_loss(leaf * 1, teacher, target, in_place=in_place, **options)
        found.append((loss.detach(), torch.autograd.grad(loss * factor, leaf)[0]))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_in_place_is_out_of_place(dtype: torch.dtype, name: str) -> None:
    student, teacher, target = make(3, 5, vocabulary=40, dtype=dtype)
    for options in ({"temperature": 2.0}, {"alpha": 1.0, "normalizer": 2.5}, {"alpha": 0.0, "label_smoothing": 0.1}):
        for factor in (1.0, 0.5):
            out, over = both_ways(student, teacher, target, factor, divergence=name, **options)
            assert torch.equal(out[0], over[0])
            tolerance = 2.0**-24 if dtype == torch.float16 else 0.0  # numbers below the least normal one are rounded twice
            torch.testing.assert_close(out[1], over[1], rtol=0, atol=tolerance)
    out, over = both_ways(student, None, target, alpha=0.0)
    assert torch.equal(out[1], over[1])
    out, over = both_ways(student, teacher, target, 0.3)
    torch.testing.assert_close(out[1], over[1], rtol=3 * torch.finfo(dtype).eps, atol=1e-7)


def test_in_place_overwrites_the_logits_and_only_them() -> None:
    student, teacher, target = make(4, vocabulary=9)
    (expected,) = torch.autograd.grad(ops.kd_loss(student.requires_grad_(), teacher, target), student)
    wide = torch.full((4, 20), 7.0, dtype=student.dtype)
    wide[:, 3:12] = student.detach()
    logits = wide.requires_grad_()[:, 3:12].mul(1.0)  # a tensor of its own
    rows = torch.cat([torch.full_like(logits, 7.0), logits, torch.full_like(logits, 7.0)], 1)[:, 9:18]
    kept = teacher.clone()
    loss, kd, ce = ops.kd_loss(rows, teacher, target, in_place=True, return_parts=True)
    assert torch.equal(rows, expected) and torch.equal(teacher, kept)
    assert rows._base is not None and (rows._base[:, :9] == 7).all() and (rows._base[:, 18:] == 7).all()
    assert loss.requires_grad and not kd.requires_grad and not ce.requires_grad
    loss.backward()
    assert wide.grad is not None and torch.equal(wide.grad[:, 3:12], expected) and not wide.grad[:, :3].any()


def test_in_place_hands_its_memory_on() -> None:
    student, teacher, target = make(4)
    logits = student.requires_grad_() * 1
    places: list[int] = []
    logits.register_hook(lambda grad: places.append(grad.data_ptr()))
    (ops.kd_loss(logits, teacher, target, in_place=True) * 2).backward()
    assert places == [logits.data_ptr()]


def test_in_place_is_seen_by_autograd() -> None:
    """Whoever saved the logits, and whoever differentiates a second time, gets an error and no wrong gradient."""
    student, teacher, target = make(4)
    leaf = student.requires_grad_()
    logits = leaf * 1
    entropy = logits.square().sum()
    loss = ops.kd_loss(logits, teacher, target, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + entropy).backward()
    loss = ops.kd_loss(leaf * 1, teacher, target, in_place=True)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)
    logits = leaf * 1
    loss = ops.kd_loss(logits, teacher, target, in_place=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ops.kd_loss(leaf * 1, teacher, target, in_place=True), leaf, create_graph=True)


def test_what_in_place_needs() -> None:
    student, teacher, target = make(3, 4)
    with torch.no_grad():
        expected = student.clone()
        assert ops.kd_loss(student, teacher, target, in_place=True) == ops.kd_loss(student, teacher, target)
    ops.kd_loss(student, teacher, target, in_place=True)
    assert torch.equal(student, expected)  # no gradient is asked for
    leaf = student.requires_grad_()
    with pytest.raises(ValueError, match="leaf"):
        ops.kd_loss(leaf, teacher, target, in_place=True)
    with pytest.raises(ValueError, match="view"):
        ops.kd_loss(leaf[1:], teacher[1:], target[1:], in_place=True)
    logits = leaf * 1
    for some in (logits[:, :3], logits.transpose(0, 1)):
        rows = (teacher[:, :3], target[:, :3]) if some.shape[0] == 3 else (teacher.transpose(0, 1), target.t())
        with pytest.raises(ValueError, match="rows of student_logits that lie at one distance"):
            ops.kd_loss(some, *rows, in_place=True)
    with pytest.raises(ValueError, match="one distance"):
        ops.kd_loss(logits[0, 0].expand(4, -1), teacher[0], target[0], in_place=True)
    with pytest.raises(ValueError, match="one distance"):
        ops.kd_loss(logits[0].t().contiguous().t(), teacher[0], target[0], in_place=True)
    for index in ((0,), (slice(None), slice(None, None, 4)), (slice(None, None, 2), 1), (0, 0)):
        ops.kd_loss((leaf * 1)[index], teacher[index], target[index], in_place=True).backward()
    empty = torch.empty(0, 7, requires_grad=True) * 1
    ops.kd_loss(empty, torch.empty(0, 7), torch.empty(0, dtype=torch.int64), in_place=True).backward()
    found = ops.explain("kd_loss_in_place", student, teacher, target)
    assert [row.backend for row in found if row.chosen] == ["reference"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_in_place(dtype: torch.dtype) -> None:
    student, teacher, target = make(3, 4, dtype=dtype)
    for some_teacher, alpha in ((teacher, 0.5), (None, 0.0)):
        torch.library.opcheck(torch.ops.cvmk.kd_loss_in_place_forward.default, prepare(student, some_teacher, target, alpha=alpha, normalizer=3))
    torch.library.opcheck(torch.ops.cvmk.kd_loss_scale_forward.default, (student, torch.tensor(0.5, dtype=dtype)))


def test_compile_in_place() -> None:
    student, teacher, target = make(3, 4, dtype=torch.float32)

    def step(z: Tensor, in_place: bool) -> Tensor:
        return ops.kd_loss(z * 1.5, teacher, target, temperature=2.0, divergence="js", in_place=in_place)

    results = []
    for function, in_place in ((step, False), (torch.compile(step, fullgraph=True, backend="aot_eager"), True)):
        z = student.clone().requires_grad_()
        loss = function(z, in_place)
        (loss * 0.5).backward()
        results.append((loss.detach(), z.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compile() -> None:
    student, teacher, target = make(3, 4, dtype=torch.float32)
    function = loss_of(teacher, target)
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        z = student.clone().requires_grad_()
        loss = run(z)
        loss.backward()
        results.append((loss.detach(), z.grad))
    torch.testing.assert_close(results[0], results[1])


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
            return ops.kd_loss(student, teacher, target, temperature=2.0)

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    exported = torch.export.export(Module(), make(3, 4, dtype=torch.float32), dynamic_shapes=({0: batch, 1: length},) * 3)
    other = make(5, 6, dtype=torch.float32)
    torch.testing.assert_close(exported.module()(*other), ops.kd_loss(*other, temperature=2.0))
