"""kd_loss on the CPU library, at every level of this machine, against the float64 reference and beside the reference of the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from new_process import said
from torch import Tensor

from cvmk import ops
from cvmk.ops import native
from cvmk.ops.kd_loss import DIVERGENCES, op, prepare

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library is not there")
AVAILABLE = native.LEVELS[: native.LEVELS.index(native.isa_level()) + 1] if native.library() is not None else ()
INF = float("inf")


@pytest.fixture(params=AVAILABLE)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CVMK_CPU_ISA", request.param)
    return str(request.param)


def make(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, vocabulary, generator=g).mul_(3).to(dtype) for _ in range(2))
    target = torch.randint(vocabulary, (rows,), generator=g)
    target[::5] = -100
    return student, teacher, target


def run(backend: str, student: Tensor, teacher: Tensor | None, target: Tensor, part: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    with ops.use(backend):
        value = ops.kd_loss(student, teacher, target, return_parts=True, **options)[part]
        (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""The greatest relative error of a number rounded to nearest (float16: of a normal one)."""


def largest_terms(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Per row, at alpha 1/2 and in float64: the magnitudes that a loss and an entry of its gradient are made of, before they cancel.

    A logarithm of a probability is the difference of a logit and a log-sum-exp. The divergence is a mean of such logarithms, cross-entropy
    one of them; an entry of the gradient is at most T (q (|log q| + |log p| + D) + p (1 + |log p|)) / 2 and what cross-entropy adds, where
    an exponential carries the rounding of its argument.
    """
    z, t, rows = student.double(), teacher.double(), target != -100
    z, t, y = z[rows], t[rows], target[rows]
    lse, lse_q, lse_p = z.logsumexp(1, True), (z / temperature).logsumexp(1, True), (t / temperature).logsumexp(1, True)
    log_q, log_p = z / temperature - lse_q, t / temperature - lse_p
    q, p, own = log_q.exp(), log_p.exp(), (z - lse).exp()
    size_q, size_p, size = (z / temperature).abs() + lse_q.abs(), (t / temperature).abs() + lse_p.abs(), z.abs() + lse.abs()
    means = [(weight * (size_q + size_p)).sum(1, True) for weight in (p, q)]
    mean = torch.maximum(*means)
    loss = 0.5 * temperature**2 * mean + 0.5 * (size.gather(1, y.unsqueeze(1)) + 0.1 * size.mean(1, True))
    grad = 0.5 * temperature * (q * (size_q + size_p + mean) + p * (1 + size_p)) + 0.5 * (own * (1 + size) + 1)
    return loss.squeeze(1), grad.amax(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("vocabulary", [3, 17, 64, 333, 2051, 4500])
def test_two_baselines(level: str, dtype: torch.dtype, name: str, temperature: float, vocabulary: int) -> None:
    """The greatest error against float64 of the same values: at most twice (loss) or thrice (gradient) that of the reference of the same
    dtype, and one rounding of the result. Where few numbers are compared - a single loss, the gradient of a small vocabulary - the
    reference's error may be nothing by luck: one rounding of the largest term that went into them is free there."""
    student, teacher, target = make(12, vocabulary, dtype, seed=vocabulary)
    options: dict[str, Any] = {"temperature": temperature, "divergence": name, "label_smoothing": 0.1}
    exact = run("reference", student.double(), teacher.double(), target, **options)
    found, reference = (run(backend, student, teacher, target, **options) for backend in ("native", "reference"))
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    (loss, theirs_loss), (grad, theirs) = ([(side[i].double() - exact[i]).abs() for side in (found, reference)] for i in (0, 1))
    loss_terms, grad_terms = largest_terms(student, teacher, target, temperature)
    single = ROUNDING[torch.float32]
    assert loss <= 2 * theirs_loss + single * (exact[0].abs() + loss_terms.mean())
    few = single * grad_terms.max() / (target != -100).sum() if vocabulary < 300 else 0.0
    assert grad.max() <= 3 * theirs.max() + ROUNDING[dtype] * exact[1].abs().max() + few


@pytest.mark.parametrize("part", [0, 1, 2])
def test_parts_and_no_teacher(level: str, part: int) -> None:
    student, teacher, target = make(9, 70)
    for temperature in (1.0, 2.0, 0.7):
        exact = run("reference", student.double(), teacher.double(), target, part, temperature=temperature, alpha=0.3)
        found = run("native", student, teacher, target, part, temperature=temperature, alpha=0.3)
        torch.testing.assert_close([x.double() for x in found], list(exact), rtol=2e-6, atol=3e-8)
    if part != 1:
        exact = run("reference", student.double(), None, target, part, alpha=0.0, label_smoothing=0.2)
        found = run("native", student, None, target, part, alpha=0.0, label_smoothing=0.2)
        torch.testing.assert_close([x.double() for x in found], list(exact), rtol=2e-6, atol=3e-8)


def test_types_may_differ_and_strides(level: str) -> None:
    student, teacher, target = make(20, 101)
    wide = torch.full((20, 150), float("nan"))
    wide[:, 7:108] = student
    expected = run("native", student, teacher.bfloat16().float(), target, temperature=2.0)
    found = run("native", wide[:, 7:108], teacher.bfloat16(), target.int(), temperature=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    every = run("native", student[::2], teacher[::2], target[::2])
    torch.testing.assert_close(every, run("native", student[::2].contiguous(), teacher[::2].contiguous(), target[::2].contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_ignored_rows_are_not_read(level: str, dtype: torch.dtype, name: str) -> None:
    student, teacher, target = make(11, 40, dtype)
    expected = run("native", student, teacher, target, divergence=name, label_smoothing=0.1)
    student[target == -100] = float("nan")
    teacher[target == -100] = INF
    found = run("native", student, teacher, target, divergence=name, label_smoothing=0.1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[1][target == -100].any()
    target.fill_(-100)
    loss, grad = run("native", student, teacher, target, divergence=name)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_masked_vocabulary(level: str, name: str, temperature: float) -> None:
    """Entries of -inf in both sides are as if they were not there, even where whole blocks of a row are."""
    student, teacher, target = make(8, 90)
    student[:, 80:] = teacher[:, 80:] = -INF
    target = target.clamp(max=79)
    wide_student, wide_teacher = (torch.nn.functional.pad(x, (0, 5000), value=-INF) for x in (student, teacher))
    options: dict[str, Any] = {"divergence": name, "temperature": temperature, "label_smoothing": 0.1}
    expected = run("reference", student[:, :80].double(), teacher[:, :80].double(), target, **options)
    loss, grad = run("native", wide_student, wide_teacher, target, **options)
    assert loss.item() == pytest.approx(expected[0].item(), rel=2e-6)
    torch.testing.assert_close(grad[:, :80].double(), expected[1], rtol=1e-4, atol=1e-7)
    assert not grad[:, 80:].any()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_masked_on_one_side_only(level: str, name: str, who: str) -> None:
    student, teacher, target = make(6, 50)
    target.clamp_(max=48)
    target[0] = 1
    (student if who == "student" else teacher)[:, 49] = -INF
    exact = ops.kd_loss(student.double(), teacher.double(), target, divergence=name, return_parts=True)[1].item()
    with ops.use("native"):
        found = ops.kd_loss(student, teacher, target, divergence=name, return_parts=True)[1].item()
    assert found == pytest.approx(exact, rel=2e-6)
    assert (found == INF) == ((name, who) in (("forward_kl", "student"), ("reverse_kl", "teacher")))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("scale", [1e2, 1e4, 3e38])
def test_extreme_logits(level: str, name: str, scale: float) -> None:
    """Equal rows: neither infinities nor a divergence. Rows that differ by a few units at 1e4, where float32 has steps of 1e-3: the error
    is that of the log-sum-exp's last place, in the reference too."""
    student = torch.tensor([[scale, 0.0, -scale, *[-scale] * 18]])
    loss, grad = run("native", student, student.clone(), torch.tensor([0]), part=1, divergence=name)
    assert loss.item() == pytest.approx(0, abs=1e-6) and grad.abs().max() < 1e-6
    if scale > 1e30:
        return
    near = torch.randn(2, 8, 300, generator=torch.Generator().manual_seed(1)) + scale
    target = torch.arange(8)
    exact = run("reference", near[0].double(), near[1].double(), target, part=1, divergence=name)
    found, reference = (run(backend, near[0], near[1], target, part=1, divergence=name) for backend in ("native", "reference"))
    last_place = 2.0**-24 * scale
    assert (found[0] - exact[0]).abs() <= 2 * (reference[0] - exact[0]).abs() + 2 * last_place
    assert (found[1] - exact[1]).abs().max() <= 3 * (reference[1] - exact[1]).abs().max() + last_place * exact[1].abs().max()


def test_not_a_number(level: str) -> None:
    loss, grad = run("native", torch.tensor([[0.0, float("nan"), 1.0]]), torch.zeros(1, 3), torch.tensor([0]))
    assert loss.isnan() and grad.isnan().any()


def test_a_row_is_the_same_in_any_batch_and_run(level: str) -> None:
    student, teacher, target = make(33, 777, torch.bfloat16)
    options: dict[str, Any] = {"temperature": 2.0, "normalizer": 8.0}
    whole = run("native", student, teacher, target, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole, run("native", student, teacher, target, **options), strict=True))
    for rows in (slice(3, 4), slice(10, 31)):
        assert torch.equal(run("native", student[rows], teacher[rows], target[rows], **options)[1], whole[1][rows])


def test_empty_and_wrong_targets(level: str) -> None:
    loss, grad = run("native", torch.empty(0, 9), torch.empty(0, 9), torch.empty(0, dtype=torch.int64))
    assert loss == 0 and grad.shape == (0, 9)
    with ops.use("native"), pytest.raises(ValueError, match=r"target holds 9, which is neither in the vocabulary 0\.\.8"):
        ops.kd_loss(torch.zeros(1, 9), torch.zeros(1, 9), torch.tensor([9]))


def test_backward_twice_and_poisoned_memory(level: str) -> None:
    student, teacher, target = make(40, 512)
    student.requires_grad_()
    with ops.use("native"):
        loss = ops.kd_loss(student, teacher, target)
        (first,) = torch.autograd.grad(loss, student, retain_graph=True)
        kept = first.clone()
        first.fill_(float("nan"))
        del first
        (second,) = torch.autograd.grad(loss * 2, student)
    assert torch.equal(second, kept * 2)


def two_passes(student: Tensor, teacher: Tensor, target: Tensor, factor: float = 1.0, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the op's two passes, as in a graph."""
    call = prepare(student, teacher, target, **options)
    with ops.use("native"):
        out = op.run_forward(call)
        grads = op.out(torch.tensor(factor), None, None, None, None)
        return out[0], op.run_backward(grads, call, op.saved_out(out[3:]), op.needs(True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_pass_is_two_passes(level: str, dtype: torch.dtype, name: str, alpha: float) -> None:
    """Bit for bit, where the incoming gradient is a power of 2 and exponentials are not kept; one more rounding elsewhere."""
    student, teacher, target = make(13, 333, dtype)
    student[target == -100] = float("nan")
    options: dict[str, Any] = {"temperature": 2.0, "divergence": name, "label_smoothing": 0.1, "alpha": alpha}
    for factor in (1.0, 0.25, 0.3):
        z = student.detach().requires_grad_()
        with ops.use("native"):
            loss = ops.kd_loss(z, teacher, target, **options)
            (grad,) = torch.autograd.grad(loss * factor, z)
        expected = two_passes(student, teacher, target, factor, **options)
        assert torch.equal(loss, expected[0])
        if factor == 0.3 or (name == "forward_kl" and dtype == torch.bfloat16):
            torch.testing.assert_close(grad, expected[1], rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[torch.float32] * expected[1].abs().max().item())
        else:
            assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("rise", [-300.0, -20.0, 20.0, 45.0, 70.0, 100.0, 150.0, 300.0])
def test_kept_exponentials_of_rows_that_rise(level: str, temperature: float, alpha: float, rise: float) -> None:
    """Blocks whose greatest logits differ, by so much that exponentials overflow or vanish, or that a factor would; and masked ones."""
    student, teacher, target = make(6, 9000, torch.bfloat16)
    for logits, at in ((student, 300), (teacher, 5000)):
        logits[:2, at:] += rise
        logits[2:4, ::2] += rise
    student[4, :400] = teacher[4, :400] = -INF
    target[:] = torch.tensor([8000, 7001, 40, 8999, 500, 3])
    options: dict[str, Any] = {"temperature": temperature, "alpha": alpha, "label_smoothing": 0.1}
    loss, grad = run("native", student, teacher, target, **options)
    exact, reference = run("reference", student.double(), teacher.double(), target, **options), run("reference", student, teacher, target, **options)
    assert loss.item() == pytest.approx(exact[0].item(), rel=2e-6)
    ours, theirs = (((x.double() - exact[1]).abs() / exact[1].abs().amax(1, keepdim=True)).amax(1) for x in (grad, reference[1]))
    assert (ours <= 1.5 * theirs + 2.0**-22).all()
    assert not grad[4, :400].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_in_place_is_out_of_place(level: str, dtype: torch.dtype, name: str, temperature: float) -> None:
    """Bit for bit, over rows at any distance, next to which nothing is written; rows that do not count become 0."""
    for vocabulary in (1, 17, 2051):
        student, teacher, target = make(9, vocabulary, dtype)
        student[target == -100] = float("nan")
        options: dict[str, Any] = {"temperature": temperature, "divergence": name, "label_smoothing": 0.1}
        expected = run("native", student, teacher, target, **options)
        wide = torch.full((9, vocabulary + 31), 7.0, dtype=dtype).requires_grad_() * 1
        rows = wide[:, 7 : 7 + vocabulary]
        with torch.no_grad():
            rows.copy_(student)
        with ops.use("native"):
            loss = ops.kd_loss(rows, teacher, target, in_place=True, **options)
        assert torch.equal(loss, expected[0]) and torch.equal(rows, expected[1])
        assert (wide[:, :7] == 7).all() and (wide[:, 7 + vocabulary :] == 7).all()
        loss.backward()


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.3])
def test_in_place_with_an_incoming_gradient(level: str, factor: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, target = make(70, 5001, dtype)
        leaf = student.clone().requires_grad_()
        found = []
        for in_place in (False, True):
            with ops.use("native"):
                found.append(torch.autograd.grad(ops.kd_loss(leaf * 1, teacher.float(), target, in_place=in_place) * factor, leaf)[0])
        assert torch.equal(*found)


def test_a_gradient_is_handed_on_once(level: str) -> None:
    """Whoever gets it may do with it what he likes: a second backward pass makes it anew, and so do the parts and second derivatives."""
    student, teacher, target = make(40, 700)
    expected = two_passes(student, teacher, target)[1]
    leaf = student.clone().requires_grad_()
    z = leaf * 1.0
    z.register_hook(lambda grad: grad.mul_(0) if scribble else None)
    with ops.use("native", "reference"):
        loss, kd, _ = ops.kd_loss(z, teacher, target, return_parts=True)
        for scribble in (True, False):
            (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            assert torch.equal(grad, torch.zeros_like(grad) if scribble else expected)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert torch.equal(grad, expected) and torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)[0].any()
        (part,) = torch.autograd.grad(kd, leaf, retain_graph=True)
        assert not torch.equal(part, expected)
        for factor in (float("nan"), INF):
            loss = ops.kd_loss(leaf, teacher, target)
            (grad,) = torch.autograd.grad(loss * factor, leaf)
            assert not grad[target != -100].isfinite().any() and not grad[target == -100].any()


def test_the_gradient_uses_its_memory_again(level: str) -> None:
    student, teacher, target = make(64, 8192)
    student.requires_grad_()
    places = set()
    for _ in range(4):
        student.grad = None
        with ops.use("native"):
            ops.kd_loss(student, teacher, target).backward()
        assert student.grad is not None
        places.add(student.grad.data_ptr())
    assert len(places) == 1


def test_what_is_declined() -> None:
    student, teacher, target = make(3, 5)
    chosen = {e.backend: e for e in ops.explain("kd_loss", student, teacher, target)}
    assert chosen["native"].chosen
    assert {e.backend: e for e in ops.explain("kd_loss_in_place", student, teacher, target)}["native"].chosen
    chosen = {e.backend: e for e in ops.explain("kd_loss", student, teacher.double(), target)}
    assert chosen["reference"].chosen and "teacher is torch.float64" in chosen["native"].reasons[0]
    assert not {e.backend: e for e in ops.explain("kd_loss", student.double(), teacher, target)}["native"].chosen


_THREADS = """
import torch
from cvmk import ops
g = torch.Generator().manual_seed(0)
z, t = torch.randn(70, 3001, generator=g).requires_grad_(), torch.randn(70, 3001, generator=g)
h, w = torch.randn(70, 48, generator=g).bfloat16().requires_grad_(), torch.randn(3001, 48, generator=g).bfloat16().requires_grad_()
y = torch.randint(3001, (70,), generator=g)
with ops.use("native", "reference"):
    ops.kd_loss(z, t, y, divergence="js").backward()
    results = [z.grad]
    if not [e for e in ops.explain("linear_kd_loss", h, w, h, w, y) if e.chosen and e.backend != "native"]:
        ops.linear_kd_loss(h, w, h.detach() * 2, w.detach(), y, temperature=2.0).backward()
        results += [h.grad, w.grad]
import hashlib
print(hashlib.sha256(b"".join(x.float().numpy().tobytes() for x in results)).hexdigest())
"""


def test_any_number_of_threads() -> None:
    assert len({said(_THREADS, OMP_NUM_THREADS=threads) for threads in ("1", "2", "3")}) == 1
