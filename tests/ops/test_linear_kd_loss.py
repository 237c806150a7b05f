"""linear_kd_loss against dense logits in float64 with PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from cvmk import ops
from cvmk.ops.linear_kd_loss import op, prepare
from cvmk.ops.reference import linear_kd_loss as reference

DIVERGENCES = ["forward_kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl"]


@pytest.fixture(autouse=True)
def the_law() -> Iterator[None]:
    """These are the tests of the reference, whatever other backends this machine has."""
    with ops.use("reference"):
        yield


class Case:
    """Student [*rows, 6] and teacher [*rows, 4] over one vocabulary, with biases."""

    def __init__(self, *rows: int, vocabulary: int = 9, dtype: torch.dtype = torch.float64, ignored: float = 0.3, widths: tuple[int, int] = (6, 4)) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.x, self.w, self.b = normal(*rows, widths[0]), normal(vocabulary, widths[0]), normal(vocabulary)
        self.xt, self.wt, self.bt = normal(*rows, widths[1]), normal(vocabulary, widths[1]), normal(vocabulary)
        self.y = torch.randint(0, vocabulary, rows, generator=generator)
        self.y[torch.rand(rows, generator=generator) < ignored] = -100

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(x.detach().clone().requires_grad_() for x in (self.x, self.w, self.b))

    def loss(self, x: Tensor, w: Tensor, b: Tensor | None, **options: Any) -> Any:
        if options.get("alpha") == 0 and not options.get("return_parts"):
            return ops.linear_kd_loss(x, w, None, None, self.y, student_bias=b, **options)
        return ops.linear_kd_loss(x, w, self.xt, self.wt, self.y, student_bias=b, teacher_bias=self.bt, **options)


def dense(case: Case, x: Tensor, w: Tensor, b: Tensor, temperature: float, alpha: float, name: str, smoothing: float) -> Tensor:
    """Whole logits, float64, autograd through PyTorch's own functions."""
    z = (F.linear(x.double(), w.double(), b.double())).flatten(0, -2)
    t = (F.linear(case.xt.double(), case.wt.double(), case.bt.double())).flatten(0, -2)
    q, p = F.softmax(z / temperature, -1), F.softmax(t / temperature, -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    rows = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "js": lambda: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
        "skew_kl": lambda: kl(p, 0.1 * p + 0.9 * q),
        "skew_reverse_kl": lambda: kl(q, 0.9 * p + 0.1 * q),
    }[name]()
    y = case.y.flatten()
    kd = rows[y != -100].sum() / (y != -100).sum()
    return alpha * temperature**2 * kd + (1 - alpha) * F.cross_entropy(z, y, ignore_index=-100, label_smoothing=smoothing)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rows_of_a_chunk", [None, 3])
def test_value_and_gradients(name: str, alpha: float, rows_of_a_chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if rows_of_a_chunk is not None:
        monkeypatch.setattr(reference, "CPU_CHUNK", 1)
        monkeypatch.setattr(reference, "CPU_ROWS", rows_of_a_chunk)
    case = Case(4, 5)
    found, expected = case.leaves(), case.leaves()
    loss = case.loss(*found, temperature=2.0, alpha=alpha, divergence=name, label_smoothing=0.1)
    exact = dense(case, *expected, temperature=2.0, alpha=alpha, name=name, smoothing=0.1)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-13)
    (loss * 3).backward()
    (exact * 3).backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_first_and_second_derivatives(name: str) -> None:
    case = Case(2, 2, vocabulary=3, widths=(3, 2))
    for options in ({"temperature": 2.0, "label_smoothing": 0.1}, {"alpha": 1.0}, {"return_parts": True, "normalizer": 2.5}):
        assert gradcheck(lambda *leaves, options=options: case.loss(*leaves, divergence=name, **options), case.leaves())
        assert gradgradcheck(lambda *leaves, options=options: case.loss(*leaves, divergence=name, **options), case.leaves())


def test_parts_are_those_of_kd_loss() -> None:
    case = Case(3, 4)
    z, t = F.linear(case.x, case.w, case.b), F.linear(case.xt, case.wt, case.bt)
    for alpha in (0.0, 0.7, 1.0):
        expected = ops.kd_loss(z, t, case.y, temperature=2.0, alpha=alpha, return_parts=True)
        torch.testing.assert_close(case.loss(case.x, case.w, case.b, temperature=2.0, alpha=alpha, return_parts=True), expected)


def test_gradients_that_nobody_needs_are_not_made() -> None:
    case = Case(5)
    for needed in range(1, 8):
        leaves = [x.requires_grad_(bool(needed >> i & 1)) for i, x in enumerate(case.leaves())]
        arguments = prepare(leaves[0], leaves[1], case.xt, case.wt, case.y, student_bias=leaves[2])
        made = [x.numel() > 0 for x in op._forward(*arguments)[5:]]
        assert made == [bool(needed >> i & 1) for i in range(3)]
        case.loss(*leaves).backward()
        expected = case.leaves()
        case.loss(*expected).backward()
        for leaf, other in zip(leaves, expected, strict=True):
            assert leaf.grad is None or torch.equal(leaf.grad, other.grad)
    with torch.no_grad():
        assert not any(prepare(*case.leaves()[:2], case.xt, case.wt, case.y).wanted)


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation below autograd returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [False, True])
def test_memory_ceiling(dtype: torch.dtype, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary = 640, 300
    monkeypatch.setattr(reference, "CPU_CHUNK", 1)
    case = Case(rows, vocabulary=vocabulary, dtype=dtype)
    leaves = case.leaves()
    # Modes are not seen inside an op's implementation, so the implementation is called itself.
    arguments = prepare(*leaves[:2], case.xt, case.wt, case.y, student_bias=leaves[2], divergence="js", label_smoothing=0.1, return_parts=parts)
    inner = op.call(*[x.detach() if isinstance(x, Tensor) else x for x in arguments])
    backend = op.reference
    with Largest() as seen:
        results = backend.forward(inner)
        grads = [torch.ones(())] * 3 if parts else [torch.ones(()), None, None]
        assert backend.backward is not None
        backend.backward(op.out(*grads, *[None] * 5), inner, op.saved_out(results[3:]), op.needs(True, True, True))
    assert 0 < seen.elements <= reference.CPU_ROWS * vocabulary < rows * vocabulary


@pytest.mark.parametrize("name", DIVERGENCES)
def test_poisoned_rows_do_not_leak(name: str) -> None:
    case = Case(4, 5, dtype=torch.float32)
    expected = case.leaves()
    case.loss(*expected, divergence=name, label_smoothing=0.1).backward()
    case.x[case.y == -100] = float("nan")
    case.xt[case.y == -100] = float("inf")
    found = case.leaves()
    loss = case.loss(*found, divergence=name, label_smoothing=0.1)
    loss.backward()
    assert loss.isfinite()
    for a, b in zip(found, expected, strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_path_of_other_devices_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4, 5)
    case.x[case.y == -100] = float("nan")

    def run(parts: bool) -> list[Tensor | None]:
        leaves = case.leaves()
        result = case.loss(*leaves, divergence="js", label_smoothing=0.1, return_parts=parts)
        (sum(result) if parts else result).backward()
        return [x.grad for x in leaves]

    expected = run(False), run(True)
    monkeypatch.setattr(reference, "row_chunks", lambda valid, size: [(slice(i, i + 3), ~valid[i : i + 3].unsqueeze(1)) for i in range(0, len(valid), 3)])
    monkeypatch.setattr("cvmk.ops.reference.kd_loss.quick_first", lambda *_: False)
    for found, wanted in zip((run(False), run(True)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_masked_vocabulary_by_bias() -> None:
    case = Case(5, vocabulary=6)
    small = case.leaves()
    case.loss(*small, label_smoothing=0.1).backward()
    wide = (case.x.clone().requires_grad_(), F.pad(case.w, (0, 0, 0, 2)).requires_grad_(), F.pad(case.b, (0, 2), value=-float("inf")).requires_grad_())
    case.wt, case.bt = F.pad(case.wt, (0, 0, 0, 2)), F.pad(case.bt, (0, 2), value=-float("inf"))
    case.loss(*wide, label_smoothing=0.1).backward()
    torch.testing.assert_close(wide[0].grad, small[0].grad)
    for a, b in zip(wide[1:], small[1:], strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad[:6], b.grad)
        assert not a.grad[6:].any()


def test_no_rows_and_nothing_to_learn_from() -> None:
    for rows, ignored in (((0, 3), 0.0), ((3, 2), 2.0)):
        case = Case(*rows, ignored=ignored)
        leaves = case.leaves()
        loss = case.loss(*leaves)
        loss.backward()
        assert loss.item() == 0
        assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_logits_and_sums(dtype: torch.dtype) -> None:
    """Against float64 on the same rounded operands: the loss is right to 1e-5, each gradient to its own last rounding."""
    case = Case(700, vocabulary=97, dtype=dtype, widths=(32, 16))
    found = case.leaves()
    loss = case.loss(*found, temperature=2.0, label_smoothing=0.1)
    loss.backward()
    expected = tuple(x.detach().double().requires_grad_() for x in found)
    exact = dense(case, *expected, temperature=2.0, alpha=0.5, name="forward_kl", smoothing=0.1)
    exact.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == dtype
        error = (a.grad.double() - b.grad).abs()
        assert (error <= torch.finfo(dtype).eps * b.grad.abs() + 1e-6).all()


def test_autocast_lowers_the_products() -> None:
    case = Case(40, dtype=torch.float32)
    low = Case(40, dtype=torch.float32)
    for name in ("x", "w", "b", "xt", "wt", "bt"):
        setattr(low, name, getattr(case, name).bfloat16())
    leaves, expected = case.leaves(), low.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss(*leaves)
    other = low.loss(*expected)
    assert torch.equal(loss, other)
    loss.backward()
    other.backward()
    for a, b in zip(leaves, expected, strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == torch.float32
        assert torch.equal(a.grad.bfloat16(), b.grad)  # not rounded, for the operand is float32


def test_backward_runs_twice_and_repeats_bit_for_bit() -> None:
    case = Case(200, vocabulary=50, dtype=torch.float32)
    leaves = case.leaves()
    seen = []
    for _ in range(2):
        loss = case.loss(*leaves)
        for scale in (1.0, 4.0, 1.0):
            seen.append([x / scale for x in torch.autograd.grad(loss * scale, leaves, retain_graph=True)])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_teacher_gets_no_gradient() -> None:
    case = Case(5)
    leaves = case.leaves()
    teacher = [x.requires_grad_() for x in (case.xt, case.wt, case.bt)]
    (grad,) = torch.autograd.grad(case.loss(*leaves), leaves[:1], create_graph=True)
    grad.square().sum().backward()
    assert all(x.grad is None for x in teacher) and all(x.grad is not None for x in leaves)


def test_strides() -> None:
    case = Case(6, 5)
    expected = case.loss(case.x, case.w, case.b)
    x = torch.zeros(6, 8, 6, dtype=torch.float64)
    x[:, 2:7] = case.x
    w = torch.zeros(9, 10, dtype=torch.float64)
    w[:, :6] = case.w
    leaf = x.requires_grad_()
    loss = case.loss(leaf[:, 2:7], w[:, :6], case.b)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert leaf.grad is not None and leaf.grad[:, 2:7].any() and not leaf.grad[:, 7:].any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"teacher_weight": torch.zeros(8, 4), "teacher_bias": None}, ValueError, "vocabulary has 8 entries and the student's 9"),
        ({"teacher_weight": None}, ValueError, "both teacher_hidden and teacher_weight"),
        ({"teacher_hidden": None, "teacher_weight": None}, ValueError, "teacher_bias only with them"),
        ({"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None}, ValueError, "without a teacher"),
        ({"teacher_hidden": torch.zeros(3, 4)}, ValueError, r"rows \(3,\)"),
        ({"student_weight": torch.zeros(9, 5)}, ValueError, "student_weight"),
        ({"student_bias": torch.zeros(8)}, ValueError, "V = 9"),
        ({"student_weight": torch.zeros(9, 6, dtype=torch.bfloat16)}, TypeError, "student_weight is torch.bfloat16"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "target has shape"),
        ({"target": torch.tensor([0, 9])}, ValueError, "target holds 9"),
        ({"temperature": -1.0}, ValueError, "temperature"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], words: str) -> None:
    case = Case(2, dtype=torch.float32)
    arguments = {"student_hidden": case.x, "student_weight": case.w, "teacher_hidden": case.xt, "teacher_weight": case.wt, "target": case.y}
    with pytest.raises(error, match=words):
        ops.linear_kd_loss(**{**arguments, "student_bias": case.b, "teacher_bias": case.bt, **change})


def test_explain_and_use() -> None:
    case = Case(3)
    found = ops.explain("linear_kd_loss", case.x, case.w, case.xt, case.wt, case.y)
    assert [row.backend for row in found if row.chosen] == ["reference"]
    with ops.use("triton"), pytest.raises(NotImplementedError, match="linear_kd_loss"):
        case.loss(case.x, case.w, case.b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    case = Case(3, 4, dtype=dtype)
    x, w, b = case.leaves()
    for student, teacher, alpha in (((x, w, b), (case.xt, case.wt, case.bt), 0.5), ((x.detach(), w, None), (None, None, None), 0.0)):
        arguments = prepare(student[0], student[1], teacher[0], teacher[1], case.y, student_bias=student[2], teacher_bias=teacher[2], alpha=alpha)
        plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        torch.library.opcheck(torch.ops.cvmk.linear_kd_loss_forward.default, plain)
        results = op._forward(*plain)
        one = torch.ones_like(results[0])
        for grads in ((one, None, None), (None, one, one)):
            backward = (*grads, *[None] * 5, *plain[:8], *results[3:], *plain[8:], arguments.wanted)
            torch.library.opcheck(torch.ops.cvmk.linear_kd_loss_backward.default, backward)


def test_compile() -> None:
    case = Case(3, 4, dtype=torch.float32)
    results = []

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return case.loss(x * 1.5, w, b, temperature=2.0, divergence="js", label_smoothing=0.1)

    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        loss = run(*leaves)
        loss.backward()
        results.append([loss.detach(), *[x.grad for x in leaves]])
    torch.testing.assert_close(results[0], results[1])


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, xt: Tensor, wt: Tensor, y: Tensor) -> Tensor:
            return ops.linear_kd_loss(x, w, xt, wt, y, temperature=2.0)

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    dims = {0: batch, 1: length}
    case, other = Case(3, 4), Case(5, 6)
    exported = torch.export.export(Module(), (case.x, case.w, case.xt, case.wt, case.y), dynamic_shapes=(dims, None, dims, None, dims))
    arguments = (other.x, other.w, other.xt, other.wt, other.y)
    torch.testing.assert_close(exported.module()(*arguments), ops.linear_kd_loss(*arguments, temperature=2.0))


def test_bfloat16_hidden_states_under_float32_weights_have_the_gradients_of_the_reference() -> None:
    """What is handed on from the forward pass is scaled by the loss's own gradient, in either dtype."""
    found = []
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        hidden, weight = torch.randn(40, 32).bfloat16().requires_grad_(), (torch.randn(70, 32) / 6).requires_grad_()
        with ops.use(backend), torch.autocast("cpu", torch.bfloat16):
            (ops.linear_kd_loss(hidden, weight, None, None, torch.randint(0, 70, (40,)), alpha=0.0) * 0.3).backward()
        found.append((hidden.grad.float(), weight.grad))
        assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()
