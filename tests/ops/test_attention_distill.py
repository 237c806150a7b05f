"""attention_kl and flash_attention_distill against dense maps made row by row in float64, and against the value-substitution identity."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from transforms import check_transforms

from cvmk.ops import attention_kl, explain, flash_attention, flash_attention_distill, native, use
from cvmk.ops.attention_distill import Out, _prepare_distill, _prepare_kl, distill_op
from cvmk.ops.reference import attention as reference
from cvmk.ops.reference.attention_distill import distill_backward, distill_forward

INF, NAN = float("inf"), float("nan")
HEADS = {
    "equal": (2, 1, 2, 2),
    "more teacher heads": (2, 2, 4, 2),
    "fewer teacher heads": (4, 2, 2, 1),
    "no common factor": (2, 2, 3, 3),
    "mixed": (4, 4, 6, 2),
}
"""Heads of the student's queries and keys, of the teacher's queries and keys."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "scales": {"scale": 0.9, "teacher_scale": -0.4},
    "key_lengths": {"key_lengths": torch.tensor([3, 0], dtype=torch.int32)},
    "both": {"causal": True, "key_lengths": torch.tensor([2, 5])},
}


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def inputs(heads: str = "equal", b: int = 2, tq: int = 4, tk: int = 5, d: int = 4, dt: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v, teacher_q, teacher_k."""
    hs, hs_kv, ht, ht_kv = HEADS[heads]
    shapes = ((b, hs, tq, d), (b, hs_kv, tk, d), (b, hs_kv, tk, 3), (b, ht, tq, dt), (b, ht_kv, tk, dt))
    return tuple(normal(*shape, dtype=dtype, seed=10 * i) for i, shape in enumerate(shapes))


def maps(q: Tensor, k: Tensor, scale: float | None, causal: bool, key_lengths: Tensor | None) -> list[list[list[tuple[list[int], Tensor]]]]:
    """For each batch item, head and row: the visible keys and their probabilities."""
    b, h, tq, d = q.shape
    tk, group = k.shape[2], h // k.shape[1]
    found = []
    for item in range(b):
        length = tk if key_lengths is None else int(key_lengths[item])
        heads = []
        for head in range(h):
            rows = []
            for i in range(tq):
                keys = [j for j in range(min(length, tk)) if not causal or j <= i + tk - tq]
                scores = [(q[item, head, i].double() * k[item, head // group, j].double()).sum() * (d**-0.5 if scale is None else scale) for j in keys]
                rows.append((keys, torch.softmax(torch.stack(scores), 0) if keys else torch.zeros(0, dtype=torch.float64)))
            heads.append(rows)
        found.append(heads)
    return found


def oracle(q: Tensor, k: Tensor, v: Tensor, teacher_q: Tensor, teacher_k: Tensor, **o: Any) -> tuple[Tensor, Tensor]:
    causal, lengths = o.get("causal", False), o.get("key_lengths")
    student = maps(q, k, o.get("scale"), causal, lengths)
    teacher = maps(teacher_q, teacher_k, o.get("teacher_scale"), causal, lengths)
    hs, ht = q.shape[1], teacher_q.shape[1]
    groups = math.gcd(hs, ht)
    outs, kls = [], []
    for item in range(q.shape[0]):
        for head in range(hs):
            first = head // (hs // groups) * (ht // groups)
            for i in range(q.shape[2]):
                keys, p = student[item][head][i]
                outs.append((p[:, None] * v[item, head // (hs // v.shape[1]), keys].double()).sum(0))
                target = sum(teacher[item][n][i][1] for n in range(first, first + ht // groups)) / (ht // groups)
                kls.append((target * (target.log() - p.log())).sum() if keys else torch.zeros((), dtype=torch.float64))
    return torch.stack(outs).view(*q.shape[:3], v.shape[3]), torch.stack(kls).view(q.shape[:3])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", OPTIONS)
def test_law_and_gradients(options: str, heads: str) -> None:
    q, k, v, tq, tk = inputs(heads)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, kl = flash_attention_distill(*leaves, tq, tk, **OPTIONS[options])
    want, want_kl = oracle(*leaves, tq, tk, **OPTIONS[options])
    only = attention_kl(q, k, tq, tk, **OPTIONS[options])
    for got, expected in ((out, want), (kl, want_kl), (only, want_kl)):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    weight, weight_kl = normal(*out.shape, seed=1), normal(*kl.shape, seed=2)
    mine = torch.autograd.grad((out * weight).sum() + (kl * weight_kl).sum(), leaves)
    theirs = torch.autograd.grad((want * weight).sum() + (want_kl * weight_kl).sum(), leaves)
    for got, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    mine = torch.autograd.grad((only * weight_kl).sum(), leaves[:2])
    theirs = torch.autograd.grad((oracle(*leaves, tq, tk, **OPTIONS[options])[1] * weight_kl).sum(), leaves[:2])
    for got, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", ["plain", "causal", "key_lengths", "both"])
def test_value_substitution(options: str) -> None:
    """The cross-entropy of the maps by attention with keys for values: sum_j P_t S = a <q, o>, o = attention(teacher_q, teacher_k, k)."""
    q, k, tq, tk = (normal(2, 2, n, d, seed=s).requires_grad_(s < 2) for s, (n, d) in enumerate(((4, 4), (5, 4), (4, 3), (5, 3))))
    o = flash_attention(tq, tk, k, **OPTIONS[options])
    _, lse = flash_attention(q, k, k, return_lse=True, **OPTIONS[options])
    _, teacher_lse = flash_attention(tq, tk, tk, return_lse=True, **OPTIONS[options])
    entropy = teacher_lse - (tq * flash_attention(tq, tk, tk, **OPTIONS[options])).sum(-1) * 3**-0.5
    seen = lse.detach() > -INF
    identity = torch.where(seen, lse - (q * o).sum(-1) * 4**-0.5 - entropy, 0)
    kl = attention_kl(q, k, tq, tk, **OPTIONS[options])
    torch.testing.assert_close(kl, identity, rtol=1e-11, atol=1e-12)
    weight = normal(*kl.shape, seed=9)
    for got, expected in zip(*(torch.autograd.grad((x * weight)[seen].sum(), (q, k)) for x in (kl, identity)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_equal_maps_are_at_no_distance() -> None:
    """A teacher that is the student with each head twice (a mean of equal maps): 0 to rounding, and so is the gradient."""
    q, k, v, _, _ = inputs("more teacher heads", dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    kl = flash_attention_distill(*leaves, q.detach().repeat_interleave(2, 1), k.detach().repeat_interleave(2, 1))[1]
    assert kl.dtype == torch.float32 and kl.abs().max() < 1e-6
    for grad in torch.autograd.grad(kl.sum(), leaves[:2]):
        assert grad.abs().max() < 1e-6


def test_teacher_is_constant() -> None:
    tensors = [t.requires_grad_() for t in inputs()]
    out, kl = flash_attention_distill(*tensors)
    assert torch.autograd.grad(kl.sum() + out.sum(), tensors[3:], allow_unused=True, retain_graph=True) == (None, None)
    first = torch.autograd.grad(kl.sum(), tensors[:2], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors, allow_unused=True)
    assert second[3] is None and second[4] is None and second[0] is not None
    assert not attention_kl(*(t.detach() for t in tensors[:2]), *tensors[3:]).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    tensors = inputs("more teacher heads", tq=9, tk=9, d=16, dt=8, dtype=dtype)
    leaves = [t.requires_grad_() for t in tensors[:3]]
    out, kl = flash_attention_distill(*leaves, *tensors[3:], causal=True)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want, want_kl = oracle(*wide, *tensors[3:], causal=True)
    assert out.dtype == dtype and kl.dtype == torch.float32
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(kl.double(), want_kl, rtol=tolerance, atol=tolerance)
    mine, theirs = torch.autograd.grad(out.float().sum() + kl.sum(), leaves), torch.autograd.grad(want.sum() + want_kl.sum(), wide)
    for got, expected in zip(mine, theirs, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("student, teacher", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64), (torch.float64, torch.float32)])
def test_teacher_of_another_dtype(student: torch.dtype, teacher: torch.dtype) -> None:
    tensors = [t.to(student if i < 3 else teacher) for i, t in enumerate(inputs())]
    leaves = [t.requires_grad_() for t in tensors[:3]]
    out, kl = flash_attention_distill(*leaves, *tensors[3:])
    want, want_kl = oracle(*leaves, *tensors[3:])
    assert out.dtype == student and kl.dtype == (torch.float64 if student == torch.float64 else torch.float32)
    tolerance = 8 * max(torch.finfo(t).eps for t in (student, teacher))
    torch.testing.assert_close(kl.double(), want_kl, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    assert all(grad.dtype == student for grad in torch.autograd.grad(kl.sum() + out.sum(), leaves))


def test_far_apart_maps() -> None:
    """One-hot maps on different keys: the distance is the difference of scores, not infinity, and not NaN."""
    q = torch.tensor([[[[1.0, 0.0]]]], requires_grad=True)
    k = torch.tensor([[[[200.0, 0.0], [0.0, 0.0], [-1e4, 0.0]]]], requires_grad=True)
    kl = attention_kl(q, k, torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[0.0, -300.0], [0.0, 300.0], [0.0, -1e4]]]]), scale=1.0, teacher_scale=1.0)
    torch.testing.assert_close(kl, torch.full((1, 1, 1), 200.0))
    grads = torch.autograd.grad(kl.sum(), (q, k))
    torch.testing.assert_close(grads[1], torch.tensor([[[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]]]))


@pytest.mark.parametrize("b, tq, tk", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empties(b: int, tq: int, tk: int) -> None:
    tensors = inputs("mixed", b=b, tq=tq, tk=tk)
    leaves = [t.requires_grad_() for t in tensors[:3]]
    for options in ({}, {"causal": True, "key_lengths": torch.zeros(b, dtype=torch.int64)}):
        out, kl = flash_attention_distill(*leaves, *tensors[3:], **options)
        assert out.shape == (b, 4, tq, 3) and kl.shape == (b, 4, tq) and (out == 0).all() and (kl == 0).all()
        for leaf, grad in zip(leaves, torch.autograd.grad(out.sum() + kl.sum(), leaves), strict=True):
            assert grad.shape == leaf.shape and (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_poison_behind_the_lengths(dtype: torch.dtype, poison: float) -> None:
    lengths = torch.tensor([3, 0])
    behind = torch.arange(5)[None, None, :, None] >= lengths[:, None, None, None]
    found = []
    for filler in (0.0, poison):
        q, k, v, tq, tk = inputs("more teacher heads", dtype=dtype)
        leaves = [t.requires_grad_() for t in (q, k.masked_fill(behind, filler), v.masked_fill(behind, filler))]
        out, kl = flash_attention_distill(*leaves, tq, tk.masked_fill(behind, filler), key_lengths=lengths)
        assert (kl[1] == 0).all() and (out[1] == 0).all()
        grads = torch.autograd.grad(out.float().square().sum() + kl.sum(), leaves, create_graph=dtype == torch.float64)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) if dtype == torch.float64 else ()
        assert all(grad.isfinite().all() for grad in (*grads, *second))
        found.append((out, kl, *grads, *second))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("limit", [1, 50, 130])
@pytest.mark.parametrize("heads", ["equal", "mixed"])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, limit: int, heads: str) -> None:
    found = []
    for block in (reference.BLOCK, limit):
        monkeypatch.setattr(reference, "BLOCK", block)
        tensors = inputs(heads)
        leaves = [t.requires_grad_() for t in tensors[:3]]
        out, kl = flash_attention_distill(*leaves, *tensors[3:], **OPTIONS["both"])
        first = torch.autograd.grad(out.square().sum() + kl.sin().sum(), leaves, create_graph=True)
        found.append((out, kl, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    for one, several in zip(*found, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-10, atol=1e-11)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return result


def test_no_map_is_ever_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward make no tensor larger than the block, whatever the length."""
    monkeypatch.setattr(reference, "BLOCK", 1 << 13)
    tensors = inputs("mixed", b=2, tq=128, tk=128, d=4, dtype=torch.float32)
    call = _prepare_distill(*tensors, causal=True)
    with Largest() as forward:
        found = distill_forward(call)
    with Largest() as backward:
        grads = Out(torch.ones_like(found.out), torch.ones_like(found.kl), None, None)  # type: ignore[arg-type]
        distill_backward(grads, call, found, distill_op.needs(True, True, True))
    assert 0 < max(forward.size, backward.size) <= 1 << 13


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", ["plain", "both", "key_lengths"])
def test_gradcheck(options: str, heads: str) -> None:
    tensors = inputs(heads, b=2, tq=2, tk=3, d=2, dt=2)
    leaves = [t.requires_grad_() for t in tensors[:3]]

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attention_distill(q, k, v, *tensors[3:], **OPTIONS[options])

    def alone(q: Tensor, k: Tensor) -> Tensor:
        return attention_kl(q, k, *tensors[3:], **OPTIONS[options])

    assert gradcheck(both, leaves) and gradcheck(alone, leaves[:2])
    if heads == "equal" or (heads, options) == ("mixed", "both"):
        assert gradgradcheck(both, leaves) and gradgradcheck(alone, leaves[:2])


def test_only_some_gradients() -> None:
    for wanted in ((0,), (1,), (2,)):
        tensors = inputs()
        everything = [t.clone().requires_grad_() for t in tensors[:3]]
        some = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors[:3])]
        losses = [sum(x.square().sum() for x in flash_attention_distill(*t, *tensors[3:])) for t in (everything, some)]
        expected = torch.autograd.grad(losses[0], everything)
        torch.testing.assert_close(torch.autograd.grad(losses[1], some[wanted[0]])[0], expected[wanted[0]])


# -- the ops in PyTorch's machinery ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    q, k, v, tq, tk = inputs("mixed", dtype=dtype)
    q, tk = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, tk))
    arguments = _prepare_distill(q, k, v, tq, tk, causal=True, key_lengths=torch.tensor([3, 0]))
    torch.library.opcheck(torch.ops.cvmk.flash_attention_distill_forward.default, arguments)
    out, kl, lse, teacher_lse = torch.ops.cvmk.flash_attention_distill_forward(*arguments)
    grads: dict[tuple[bool, ...], Any] = {(True, True, True): (torch.ones_like(out), torch.ones_like(kl), None, None)}
    if dtype == torch.float64:
        grads[False, True, False] = (None, None, torch.ones_like(lse), None)
    for needs, given in grads.items():
        rest = (*arguments[:6], out, lse, teacher_lse, *arguments[6:], list(needs))
        torch.library.opcheck(torch.ops.cvmk.flash_attention_distill_backward.default, (*given, *rest))
    maps = _prepare_kl(q, k, tq, tk)
    torch.library.opcheck(torch.ops.cvmk.attention_kl_forward.default, maps)
    kl, lse, teacher_lse = torch.ops.cvmk.attention_kl_forward(*maps)
    rest = (*maps[:5], lse, teacher_lse, *maps[5:], [True, True])
    torch.library.opcheck(torch.ops.cvmk.attention_kl_backward.default, (torch.ones_like(kl), None, None, *rest))


def test_compile() -> None:
    tensors = inputs(dtype=torch.float32)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, kl = flash_attention_distill(q * 2, k, v, *tensors[3:], causal=True)
        return out.square().sum() + kl.sum() + attention_kl(q, k, *tensors[3:]).sum()

    found = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in tensors[:3]]
        loss = function(*leaves)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(eager, traced)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_transforms(backend: str, options: str) -> None:
    if backend == "native" and native.library() is None:
        pytest.skip("the native library is not there")
    tensors = inputs("mixed", dtype=torch.float32 if backend == "native" else torch.float64)

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attention_distill(q, k, v, *tensors[3:], **OPTIONS[options])

    def alone(q: Tensor, k: Tensor) -> Tensor:
        return attention_kl(q, k, *tensors[3:], **OPTIONS[options])

    tolerance = {"rtol": 1e-3, "atol": 1e-4} if backend == "native" else {}
    with use(backend):
        check_transforms(both, tensors[:3], **tolerance)
        check_transforms(alone, tensors[:2], **tolerance)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_lengths_are_any_numbers(backend: str) -> None:
    tensors = inputs("mixed", dtype=torch.float32)
    most, least = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min
    with use(backend) if backend == "reference" or native.library() is not None else nullcontext():
        found, want = (flash_attention_distill(*tensors, key_lengths=torch.tensor(lengths)) for lengths in ([most, least], [5, 0]))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


class Loss(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out, kl = flash_attention_distill(q, k, v, tq, tk, key_lengths=lengths)
        return out, kl + attention_kl(q, k, tq, tk, causal=True)


def test_export() -> None:
    batch, tq, tk = torch.export.Dim("batch"), torch.export.Dim("tq"), torch.export.Dim("tk")
    shapes = ({0: batch, 2: tq}, {0: batch, 2: tk}, {0: batch, 2: tk}, {0: batch, 2: tq}, {0: batch, 2: tk}, {0: batch})
    program = torch.export.export(Loss(), (*inputs("mixed"), torch.tensor([4, 5])), dynamic_shapes=shapes)
    other = (*inputs("mixed", b=3, tq=6, tk=8), torch.tensor([8, 0, 2]))
    for got, expected in zip(program.module()(*other), Loss()(*other), strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast() -> None:
    tensors = inputs(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in tensors[:3]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, kl = flash_attention_distill(*leaves, *tensors[3:])
        only = attention_kl(*leaves[:2], *tensors[3:])
    assert out.dtype == torch.bfloat16 and kl.dtype == torch.float32
    lowered = [t.detach().bfloat16() for t in tensors]
    assert torch.equal(kl, flash_attention_distill(*lowered)[1]) and torch.equal(kl, only)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(kl.sum() + out.float().sum(), leaves))


def test_explain_use_and_repeat() -> None:
    tensors = inputs(dtype=torch.float32)
    for name, arguments in (("attention_kl", (*tensors[:2], *tensors[3:])), ("flash_attention_distill", tensors)):
        assert {row.backend: row.reasons for row in explain(name, *arguments, causal=True)}["reference"] == ()
    with use("reference"):
        runs = [flash_attention_distill(*tensors, causal=True) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"q": torch.ones(2, 2, 4)}, ValueError, r"q must be \[B, H, T, D\]"),
        ({"v": torch.ones(2, 1, 4, 3)}, ValueError, "all but the last"),
        ({"k": torch.ones(2, 1, 5, 4)}, TypeError, "q and k must have one dtype"),
        ({"teacher_q": torch.ones(2, 2, 3, 3)}, ValueError, r"sizes \[B, Tq, Tk\] = \[2, 3, 5\], q and k \[2, 4, 5\]"),
        ({"teacher_k": torch.ones(2, 2, 5, 3)}, TypeError, "teacher_q and teacher_k must have one dtype"),
        ({"teacher_k": torch.ones(2, 2, 5, 2)}, ValueError, "teacher_q .* differ in the last dimension"),
        ({"teacher_q": torch.ones(2, 2, 4, 3, dtype=torch.int64)}, TypeError, "teacher_q must be float64"),
        ({"key_lengths": torch.ones(3, dtype=torch.int64)}, ValueError, r"key_lengths must be \[B\] = \[2\]"),
        ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths must be int32"),
        ({"scale": NAN}, ValueError, "scale must be a finite number, not nan"),
        ({"teacher_scale": INF}, ValueError, "teacher_scale must be a finite number, not inf"),
        ({"scale": torch.tensor(0.5, requires_grad=True)}, TypeError, "scale is a tensor that asks for a gradient.*multiply it into an argument"),
        ({"teacher_scale": torch.tensor(0.5, requires_grad=True)}, TypeError, "teacher_scale is a tensor that asks for a gradient"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = dict(zip(("q", "k", "v", "teacher_q", "teacher_k"), inputs(), strict=True))
    with pytest.raises(error, match=words):
        flash_attention_distill(**{**arguments, **changes})
    if "q" not in changes and "k" not in changes and "v" not in changes:
        names = {"q": "student_q", "k": "student_k"}
        with pytest.raises(error):
            attention_kl(**{names.get(name, name): value for name, value in {**arguments, **changes}.items() if name != "v"})
