"""Every op of the CPU library over drawn cases: odd shapes and strides, nothing at all, rows that see nothing, NaN and infinities, threads.

One case is computed by the reference in float64 and in its own dtype, and by the kernels under every cap of CVMK_CPU_ISA that matters here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from new_process import said
from torch import Tensor

from cvmk import ops
from cvmk.ops import native
from cvmk.ops._op import forget_choices
from cvmk.ops.kd_loss import DIVERGENCES

from ._linear import LEVELS

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="the native library is not there"),
    pytest.mark.timeout(400),  # threads that share too few processors wait for each other
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
drawn = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip


@dataclass
class Case:
    """Tensors as the op gets them, and the call; by name, the tensors that have gradients and those that may hold NaN and infinities; and the size
    of terms that may cancel each other, whose rounding a result of 0 still holds."""

    tensors: dict[str, Tensor]
    call: Callable[[dict[str, Tensor]], Any]
    leaves: tuple[str, ...] = ()
    spoil: tuple[str, ...] = ()
    unit: float = 1e-2
    kinked: bool = False
    """Whether the derivative jumps, as a relu's: NaN falls on one side, and the gradient is finite and another."""


class Draw:
    """What the cases are drawn with."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), label="seed"))
        self.dtype = self.one_of(FLOATS)

    def one_of(self, values: Any) -> Any:
        return self.data.draw(st.sampled_from(list(values)))

    def size(self, *usual: int) -> int:
        return self.one_of(usual)

    def yes(self) -> bool:
        return bool(self.data.draw(st.booleans()))

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Numbers in a tensor whose last dimension is contiguous; the others lie in any order, with gaps full of NaN between them."""
        values = torch.randn(shape, generator=self.generator).mul(scale).to(dtype or self.dtype)
        order = self.data.draw(st.permutations(range(len(shape) - 1)), label="order of the dimensions in memory") if len(shape) > 2 else range(len(shape) - 1)
        gaps = [self.one_of((0, 0, 1, 3)) for _ in shape]
        wide = torch.full([shape[i] + gaps[i] for i in order] + [shape[-1] + gaps[-1]], NAN, dtype=values.dtype)
        view = wide.permute([list(order).index(i) for i in range(len(shape) - 1)] + [len(shape) - 1])[tuple(slice(0, n) for n in shape)]
        return view.copy_(values)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(max(below, 1), shape, generator=self.generator, dtype=self.one_of((torch.int32, torch.int64)))


def attention(draw: Draw) -> Case:
    b, groups, per = draw.size(1, 2, 0), draw.size(1, 2), draw.size(1, 2, 3)
    rows, keys, d, dv = draw.size(1, 2, 17, 33, 0), draw.size(1, 5, 64, 65, 0), draw.size(1, 8, 20, 33, 64), draw.size(1, 16, 40)
    options: dict[str, Any] = {"causal": draw.yes(), "softcap": draw.one_of((0.0, 0.0, 4.0)), "window": draw.one_of((None, None, 3, (5, -1)))}
    tensors = {"q": draw.normal(b, groups * per, rows, d), "k": draw.normal(b, groups, keys, d), "v": draw.normal(b, groups, keys, dv)}
    if draw.yes():
        tensors["key_lengths"] = draw.integers(keys + 1, b)
    if draw.yes():
        tensors["bias"] = draw.normal(*draw.one_of([(b, groups * per, rows, keys), (1, keys), (rows, keys)]), dtype=torch.float32)
        if draw.yes():
            tensors["bias"][..., ::2] = -INF

    def call(t: dict[str, Tensor]) -> Any:
        out, lse = ops.flash_attention(t["q"], t["k"], t["v"], key_lengths=t.get("key_lengths"), bias=t.get("bias"), return_lse=True, **options)
        return out, lse.masked_fill(lse == -INF, 0)

    return Case(tensors, call, tuple(name for name in ("q", "k", "v", "bias") if name in tensors), ("q",))


def distilled_attention(draw: Draw) -> Case:
    b, rows, keys = draw.size(1, 2, 0), draw.size(1, 17, 33, 0), draw.size(1, 5, 64, 65, 0)
    heads, teacher_heads, d, dt = draw.one_of([(1, 1), (2, 2), (2, 4), (4, 2), (2, 3)]), draw.yes(), draw.size(1, 8, 33), draw.size(4, 24)
    tensors = {"q": draw.normal(b, heads[0], rows, d), "k": draw.normal(b, heads[0], keys, d), "v": draw.normal(b, heads[0], keys, draw.size(1, 16))}
    tensors |= {"tq": draw.normal(b, heads[1], rows, dt), "tk": draw.normal(b, heads[1] if teacher_heads else 1, keys, dt)}
    options: dict[str, Any] = {"causal": draw.yes(), "key_lengths": draw.integers(keys + 1, b) if draw.yes() else None}
    if draw.yes():
        del tensors["v"]
        return Case(tensors, lambda t: ops.attention_kl(t["q"], t["k"], t["tq"], t["tk"], **options), ("q", "k"), ("q", "tq"), 0.2)
    return Case(tensors, lambda t: ops.flash_attention_distill(t["q"], t["k"], t["v"], t["tq"], t["tk"], **options), ("q", "k", "v"), ("q", "tq"), 0.2)


def scan(draw: Draw) -> Case:
    b, groups, per, length, n = draw.size(1, 2, 0), draw.size(1, 2), draw.size(1, 3, 17), draw.size(1, 2, 17, 65, 0), draw.size(1, 3, 16)
    dim = groups * per
    t = {"u": draw.normal(b, dim, length), "delta": draw.normal(b, dim, length, scale=0.5)}
    t["A"] = -draw.normal(dim, n, dtype=torch.float32).abs()
    t["B"], t["C"] = (draw.normal(*draw.one_of([(dim, n), (b, groups, n, length)])) for _ in "BC")
    optional = {"D": (dim,), "z": (b, dim, length), "delta_bias": (dim,), "initial_state": (b, dim, n)}
    for name, shape in optional.items():
        if draw.yes():
            t[name] = draw.normal(*shape, dtype=None if name == "z" else torch.float32)
    options = {"reverse": draw.yes(), "channels_last": draw.yes()}
    if options["channels_last"]:
        t = {name: x.mT if x.dim() == 3 and name in ("u", "delta", "z") else x.permute(0, 3, 1, 2) if x.dim() == 4 else x for name, x in t.items()}

    def call(t: dict[str, Tensor]) -> Any:
        return ops.selective_scan(**t, delta_softplus=True, return_last_state=True, **options)

    return Case(t, call, tuple(t), ("u", "delta"))


def step(draw: Draw) -> Case:
    b, groups, per, n = draw.size(1, 3, 0), draw.size(1, 2), draw.size(1, 5, 17), draw.size(1, 3, 16, 17)
    dim = groups * per
    t = {"state": draw.normal(b, dim, n, dtype=torch.float32), "x": draw.normal(b, dim), "dt": draw.normal(b, dim)}
    t |= {"A": -draw.normal(dim, n, dtype=torch.float32).abs(), "B": draw.normal(b, groups, n), "C": draw.normal(b, groups, n)}
    for name, shape in {"D": (dim,), "z": (b, dim), "dt_bias": (dim,)}.items():
        if draw.yes():
            t[name] = draw.normal(*shape, dtype=None if name == "z" else torch.float32)

    def call(t: dict[str, Tensor]) -> Any:
        state = t["state"].clone()
        optional = {name: t.get(name) for name in ("D", "z", "dt_bias")}
        return ops.selective_state_update(state, t["x"], t["dt"], t["A"], t["B"], t["C"], **optional, dt_softplus=True), state

    return Case(t, call, (), ("x", "state"))


def loss_options(draw: Draw) -> dict[str, Any]:
    return {
        "divergence": draw.one_of(DIVERGENCES), "temperature": draw.one_of((1.0, 2.0, 0.7)), "alpha": draw.one_of((0.3, 1.0)),
        "label_smoothing": draw.one_of((0.0, 0.1)), "return_parts": True,
    }  # fmt: skip


def targets(draw: Draw, rows: int, vocabulary: int) -> Tensor:
    target = draw.integers(vocabulary, rows)
    if draw.yes():
        target[:: draw.one_of((1, 2))] = -100
    return target


def convolution(draw: Draw) -> Case:
    b, dim, length, width = draw.size(1, 2, 0), draw.size(1, 3, 17), draw.size(1, 2, 17, 65, 0), draw.size(1, 2, 4, 8)
    t = {"x": draw.normal(b, dim, length), "weight": draw.normal(dim, width, dtype=draw.one_of((draw.dtype, torch.float32)))}
    for name, shape in {"bias": (dim,), "initial_state": (b, dim, width - 1)}.items():
        if draw.yes():
            t[name] = draw.normal(*shape)
    leaves = tuple(t)
    if draw.yes():
        t["lengths"] = draw.integers(length + 1, b)
    options: dict[str, Any] = {"activation": draw.one_of((None, "silu")), "channels_last": draw.yes(), "reverse": draw.yes()}
    if options["channels_last"]:
        t["x"] = t["x"].mT
    return Case(t, lambda t: ops.causal_conv1d(**t, **options, return_last_state=True), leaves, ("x",), 0.1)


def convolution_step(draw: Draw) -> Case:
    b, dim, width = draw.size(1, 3, 0), draw.size(1, 5, 17, 40), draw.size(1, 2, 4)
    t = {"state": draw.normal(b, dim, width - 1), "x": draw.normal(b, dim), "weight": draw.normal(dim, width)}
    if draw.yes():
        t["bias"] = draw.normal(dim)
    activation = draw.one_of((None, "silu"))

    def call(t: dict[str, Tensor]) -> Any:
        state = t["state"].clone()
        return ops.causal_conv1d_update(state, t["x"], t["weight"], t.get("bias"), activation=activation), state

    return Case(t, call, (), ("x",), 0.1)


def kd_loss(draw: Draw) -> Case:
    rows, vocabulary = draw.size(1, 7, 16, 0), draw.size(1, 3, 16, 65, 700)
    t = {"student": draw.normal(rows, vocabulary, scale=2.0), "teacher": draw.normal(rows, vocabulary, dtype=draw.one_of(FLOATS), scale=2.0)}
    target, options = targets(draw, rows, vocabulary), loss_options(draw)
    return Case(t, lambda t: ops.kd_loss(t["student"], t["teacher"], target, **options), ("student",), ("student", "teacher"), 0.1)


def linear_kd_loss(draw: Draw) -> Case:
    rows, vocabulary, ds, dt = draw.size(1, 16, 33, 0), draw.size(3, 64, 130), draw.size(1, 16, 33), draw.size(8, 40)
    other = draw.one_of((draw.dtype, torch.float32))
    t = {"hidden": draw.normal(rows, ds), "weight": draw.normal(vocabulary, ds)}
    t |= {"th": draw.normal(rows, dt, dtype=other), "tw": draw.normal(vocabulary, dt, dtype=other)}
    target, options = targets(draw, rows, vocabulary), loss_options(draw)
    return Case(t, lambda t: ops.linear_kd_loss(t["hidden"], t["weight"], t["th"], t["tw"], target, **options), ("hidden", "weight"), ("hidden", "th"), 0.1)


def linear(draw: Draw, bits: int) -> Case:
    activation = draw.one_of((None, None, "relu", "gelu", "silu", "swiglu"))
    m, n = draw.size(1, 3, 17, 66, 0), draw.size(1, 16, 33, 70) * (2 if activation == "swiglu" else 1)
    group = draw.size(32, 64, 128)
    k = draw.size(1, 2, 5) * group if bits == 4 else draw.size(1, 31, 64, 200)
    lead = (m,) if draw.yes() else (2, m)
    t = {"x": draw.normal(*lead, k)}
    weight = torch.randn(n, k, generator=draw.generator)
    if draw.yes():
        t["bias"] = draw.normal(n)
    if bits == 8:
        return Case(t, lambda t: ops.int8_linear(t["x"], ops.quantize_int8(weight), t.get("bias"), activation=activation), (), ("x",))
    return Case(t, lambda t: ops.int4_linear(t["x"], ops.quantize_int4(weight, group), t.get("bias"), activation=activation), (), ("x",))


def residual_norm(draw: Draw) -> Case:
    lead, n = draw.one_of([(1,), (7,), (70,), (0,), (3, 12)]), draw.size(1, 2, 16, 33, 130)
    weights = draw.one_of((draw.dtype, torch.float32))
    t = {"x": draw.normal(*lead, n), "weight": draw.normal(n, dtype=weights)}
    if draw.yes():
        t["branch"] = draw.normal(*lead, n, dtype=draw.one_of((draw.dtype, torch.bfloat16)))
    if draw.yes():
        t["bias"] = draw.normal(n, dtype=weights)
    p, norm, eps = draw.one_of((0.0, 0.1, 0.999)), draw.one_of(("layer", "rms")), draw.one_of((1e-5, 1e-2))

    def call(t: dict[str, Tensor]) -> Any:
        torch.manual_seed(7)
        return ops.residual_norm(t["x"], t.get("branch"), t["weight"], t.get("bias"), norm=norm, eps=eps, dropout_p=p)

    return Case(t, call, tuple(t), ("x", *(("branch",) if "branch" in t else ())), 0.1)


def embed(draw: Draw) -> Case:
    shape, n, vocabulary = draw.one_of([(1,), (7,), (3, 40), (0, 5)]), draw.size(1, 2, 16, 33, 130), draw.size(1, 3, 200)
    ids = draw.integers(vocabulary, *shape)
    t = {"weight": draw.normal(vocabulary, n)}
    if draw.yes():
        t["positions"] = draw.normal(shape[-1], n, dtype=draw.one_of((draw.dtype, torch.float32)))
    p, scale = draw.one_of((0.0, 0.1, 0.999)), draw.one_of((1.0, 11.3))

    def call(t: dict[str, Tensor]) -> Any:
        torch.manual_seed(7)
        return ops.embed(ids, t["weight"], t.get("positions"), scale=scale, dropout_p=p)

    return Case(t, call, ("weight",), ("weight",), 0.1)


def fused_linear(draw: Draw) -> Case:
    activation = draw.one_of((None, "relu", "gelu", "silu", "swiglu"))
    m, k, n = draw.size(1, 3, 17, 66, 130, 0), draw.size(1, 31, 64, 200), draw.size(1, 16, 33, 70) * (2 if activation == "swiglu" else 1)
    t = {"x": draw.normal(*((m,) if draw.yes() else (2, m)), k), "weight": draw.normal(n, k, scale=k**-0.5)}
    if draw.yes():
        t["bias"] = draw.normal(n)
    p = draw.one_of((0.0, 0.0, 0.2, 0.999))

    def call(t: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)
        return ops.fused_linear(t["x"], t["weight"], t.get("bias"), activation=activation, dropout_p=p)

    return Case(t, call, tuple(t), ("x",), 0.1, kinked=activation == "relu")


CASES: dict[str, Callable[[Draw], Case]] = {
    "attention": attention,
    "distilled attention": distilled_attention,
    "scan": scan,
    "step": step,
    "convolution": convolution,
    "convolution step": convolution_step,
    "kd_loss": kd_loss,
    "linear_kd_loss": linear_kd_loss,
    "residual_norm": residual_norm,
    "embed": embed,
    "fused_linear": fused_linear,
    "int8_linear": lambda draw: linear(draw, 8),
    "int4_linear": lambda draw: linear(draw, 4),
}
every_op = pytest.mark.parametrize("op", CASES)


def run(case: Case, backend: str, double: bool = False) -> list[Tensor]:
    """The results, and the gradients of a fixed weighting of them."""
    tensors = {name: x.detach().to(torch.float64) if double and x.is_floating_point() else x.detach() for name, x in case.tensors.items()}
    leaves = [tensors[name].requires_grad_() for name in case.leaves]
    with ops.use(backend):
        found = case.call(tensors)
        results = [found] if isinstance(found, Tensor) else list(found)
        if not leaves:
            return [x.detach() for x in results]
        g = torch.Generator().manual_seed(3)
        loss = sum((x * torch.randn(x.shape, generator=g).to(x.dtype)).sum(dtype=torch.float64) for x in results)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if torch.is_tensor(loss) and loss.requires_grad else [None] * len(leaves)
    return [x.detach() for x in results] + [torch.zeros_like(leaf) if x is None else x for x, leaf in zip(grads, leaves, strict=True)]


@contextmanager
def capped(cap: str) -> Iterator[None]:
    """Kernels of one level, and fresh memory that is full of NaN."""
    before = os.environ.get("CVMK_CPU_ISA")
    os.environ["CVMK_CPU_ISA"] = cap
    forget_choices()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CVMK_CPU_ISA")
        if before is not None:
            os.environ["CVMK_CPU_ISA"] = before


def native_results(case: Case) -> Iterator[tuple[str, list[Tensor]]]:
    """By cap, what the kernels give; where none takes the case, nothing."""
    for cap in LEVELS:
        with capped(cap):
            try:
                yield cap, run(case, "native")
            except NotImplementedError:
                continue


@every_op
@drawn
@given(st.data())
def test_two_baselines(op: str, data: st.DataObject) -> None:
    case = CASES[op](Draw(data))
    exact, theirs = run(case, "reference", double=True), run(case, "reference")
    results = len(theirs) - len(case.leaves)
    for cap, ours in native_results(case):
        for i, (want, reference, got) in enumerate(zip(exact, theirs, ours, strict=True)):
            assert got.shape == reference.shape and got.dtype == reference.dtype, (cap, i)
            finite = reference.isfinite()
            assert torch.equal(got.isfinite(), finite) and torch.equal(got[~finite], reference[~finite]), (cap, i)
            if not finite.any():
                continue
            errors = [(x.double() - want)[finite].abs() for x in (got, reference)]
            floor = 4 * torch.finfo(got.dtype).eps * max(want[finite].abs().max().item(), case.unit)
            assert errors[0].max() <= (2 if i < results else 3) * errors[1].max() + floor, (cap, i, errors[0].max(), errors[1].max())


@every_op
@drawn
@given(st.data())
def test_threads_runs_and_strides_give_the_same_bits(op: str, data: st.DataObject) -> None:
    case = CASES[op](Draw(data))
    plain = Case({name: x.contiguous() for name, x in case.tensors.items()}, case.call, case.leaves)
    before = torch.get_num_threads()
    try:
        for cap, first in native_results(case):
            for count, again in itertools.product((1, 2, 3), (case, plain)):
                torch.set_num_threads(count)
                with capped(cap):
                    for i, (a, b) in enumerate(zip(first, run(again, "native"), strict=True)):
                        assert torch.equal(a, b), (cap, count, again is plain, i, (a.double() - b.double()).abs().max())
            torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)


@every_op
@drawn
@given(st.data())
def test_nan_and_infinities_reach_what_depends_on_them_and_nothing_else(op: str, data: st.DataObject) -> None:
    """What the reference keeps finite with NaN in a place keeps its bits, whatever is in that place; a result that is not finite in the reference
    is not finite here either, except in rows that see nothing (the gradient of a loss that is not finite is undefined)."""
    draw = Draw(data)
    case = CASES[op](draw)
    place = case.tensors[draw.one_of(case.spoil)]
    if place.numel() == 0:
        return
    flat = data.draw(st.integers(0, place.numel() - 1))
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), place.shape))
    clean = dict(native_results(case))
    place[index] = NAN
    free = [x.isfinite() for x in run(case, "reference")]
    place[index] = draw.one_of((NAN, INF, -INF))
    theirs = run(case, "reference")
    for cap, ours in native_results(case):
        for i, (got, untouched, keeps, reference) in enumerate(zip(ours, clean[cap], free, theirs, strict=True)):
            if case.kinked and i >= len(ours) - len(case.leaves):
                continue
            assert torch.equal(got[keeps], untouched[keeps]), (cap, i, got, untouched, keeps)
            if i < len(ours) - len(case.leaves):
                assert not got[~reference.isfinite() & (untouched != 0)].isfinite().any(), (cap, i, got, reference)


GROWTH = """
import torch
from cvmk import ops
from resident_memory import growth
small, large = torch.zeros(2, 2, 8, 16), torch.randn(1, 2, 2048, 16)
student, teacher, target = torch.randn(512, 16000).requires_grad_(), torch.randn(512, 16000), torch.arange(512)

def attention(x):
    q = x.detach().requires_grad_()
    with ops.use("native"):
        out, kl = ops.flash_attention_distill(q, x, x, x, x)
        (out.sum() + kl.sum() + ops.attention_kl(q, x, x, x).sum()).backward()

def loss(rows):
    with ops.use("native"):
        torch.autograd.grad(ops.kd_loss(*rows), rows[0])

few = [student[:2].detach().requires_grad_(), teacher[:2], target[:2]]
for call, warm, argument in ((attention, small, large), (loss, few, (student, teacher, target))):
    call(warm)
    print(growth(lambda: call(argument)) >> 20)
"""


def test_ceilings_on_memory() -> None:
    """In MiB: nothing of the size of a map of attention (16 a head), and of the logits' 31 only the gradient. (The other ops: in their own files.)"""
    attention, loss = map(int, said(GROWTH).split())
    assert attention < 12 and loss < 31 + 8, (attention, loss)
