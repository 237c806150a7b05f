"""fused_linear against float64 written out: results and gradients in every dtype, dropout, and life inside PyTorch."""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from transforms import check_transforms

from cvmk import ops
from cvmk.ops import fused_linear, native

FORWARD, BACKWARD = torch.ops.cvmk.fused_linear_forward.default, torch.ops.cvmk.fused_linear_backward.default
op_module = importlib.import_module("cvmk.ops.fused_linear")
ACTIVATIONS = (None, "relu", "gelu", "silu", "swiglu")
ON_CPU = ("reference", *(["native"] if native.library() is not None else []))
NARROW = (torch.float32, torch.bfloat16, torch.float16)
every_backend = pytest.mark.parametrize("backend", ON_CPU)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def layer(m: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(m, k, dtype=dtype), random(n, k, seed=1, dtype=torch.float64).div(math.sqrt(k)).to(dtype), random(n, seed=2, dtype=dtype)]


def mix(x: Tensor) -> Tensor:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> shift) * factor & 0xFFFFFFFF
    return x ^ x >> 16


def kept(seed: Tensor, p: float, rows: int, columns: int) -> Tensor:
    """The generator of `cvmk.ops._dropout`, on int64 words."""
    key = mix(mix(seed[:1] & 0xFFFFFFFF) ^ (seed[1:] & 0xFFFFFFFF))
    row = mix((mix(key) + torch.arange(rows)) & 0xFFFFFFFF)
    return mix(row[:, None] ^ mix(key ^ mix(torch.arange(columns)))) >= int(p * 2**32)


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """The law, differentiable, in the dtype of its arguments (float64)."""
    y = torch.einsum("mk,nk->mn", x, weight) + (0 if bias is None else bias)
    if activation == "relu":
        y = torch.where(y <= 0, y * 0, y)
    elif activation == "gelu":
        y = y * 0.5 * torch.special.erfc(-y / math.sqrt(2))
    elif activation == "silu":
        y = y * torch.sigmoid(y)
    elif activation == "swiglu":
        half = y.shape[1] // 2
        y = y[:, :half] * torch.sigmoid(y[:, :half]) * y[:, half:]
    return y if seed is None else torch.where(kept(seed, p, *y.shape), y / (1 - p), 0)


def seed_of_next_call() -> Tensor:
    """What the next call with dropout draws."""
    state = torch.get_rng_state()
    seed = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64)
    torch.set_rng_state(state)
    return seed


def results(function: Any, tensors: list[Tensor], g: Tensor, *options: Any, **named: Any) -> list[Tensor]:
    """The result and the gradients of the tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, *options, **named)
    return [out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype))]


def check(found: list[Tensor], peer: list[Tensor], law: list[Tensor], eps: float) -> None:
    """Twice the reference's error for results, three times for gradients."""
    for i, (got, other, want) in enumerate(zip(found, peer, law, strict=True)):
        assert got.dtype == other.dtype and got.shape == want.shape, i
        if got.numel():
            error, theirs = ((t.double() - want).abs().max().item() for t in (got, other))
            assert error <= (3 if i else 2) * theirs + 4 * eps * max(want.abs().max().item(), 1e-2), (i, error, theirs)


# -- results and gradients ---------------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", NARROW)
def test_law(backend: str, dtype: torch.dtype, activation: str | None) -> None:
    for (m, k, n), p in itertools.product(((1, 1, 2), (17, 31, 34), (65, 128, 256), (130, 300, 66), (600, 33, 34)), (0.0, 0.3)):
        tensors = layer(m, k, n, dtype)
        g = random(m, n // 2 if activation == "swiglu" else n, seed=3, dtype=dtype)
        seed = seed_of_next_call() if p else None
        law = results(oracle, [t.double() for t in tensors], g.double(), activation, p, seed)
        by = {}
        for name in ("reference", backend):
            state = torch.get_rng_state()
            with ops.use(name):
                by[name] = results(fused_linear, tensors, g, activation=activation, dropout_p=p)
            torch.set_rng_state(state)
        check(by[backend], by["reference"], law, torch.finfo(dtype).eps)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_law_in_float64(activation: str | None) -> None:
    tensors = layer(9, 20, 14, torch.float64)
    g = random(9, 7 if activation == "swiglu" else 14, seed=3, dtype=torch.float64)
    for p in (0.0, 0.4):
        seed = seed_of_next_call() if p else None
        law = results(oracle, tensors, g, activation, p, seed)
        found = results(fused_linear, tensors, g, activation=activation, dropout_p=p)
        for got, want in zip(found, law, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_gives_float32_weights_float32_gradients(backend: str, activation: str | None) -> None:
    """At most three times the error of PyTorch's own layer under autocast, which rounds the weight's gradient to bfloat16."""
    for inputs in (torch.float32, torch.bfloat16):
        tensors = layer(70, 96, 80)
        tensors[0] = tensors[0].to(inputs)
        g = random(70, 40 if activation == "swiglu" else 80, seed=3, dtype=torch.bfloat16)
        law = results(oracle, [t.double() for t in tensors], g.double(), activation)
        by = {}
        for name in ("reference", backend):
            with ops.use(name), torch.autocast("cpu", torch.bfloat16):
                by[name] = results(fused_linear, tensors, g, activation=activation)
        assert [t.dtype for t in by[backend]] == [torch.bfloat16, inputs, torch.float32, torch.float32]
        check(by[backend], by["reference"], law, torch.finfo(torch.bfloat16).eps)
    if backend == "native":
        assert not torch.equal(by["native"][2], by["native"][2].bfloat16().float()), "the weight's gradient is not rounded to bfloat16"


def test_autocast_leaves_float64_alone() -> None:
    x, weight, bias = layer(3, 5, 4, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@every_backend
def test_leading_dimensions_and_strides(backend: str) -> None:
    def same(got: Tensor, want: Tensor) -> bool:
        return torch.equal(got, want) if backend == "native" else torch.allclose(got, want, rtol=1e-5, atol=1e-5)  # PyTorch's rows depend on how they lie

    with ops.use(backend):
        x, weight, bias = random(4, 3, 20), random(6, 20), random(6)
        flat = fused_linear(x.reshape(12, 20), weight, bias)
        assert same(fused_linear(x, weight, bias), flat.view(4, 3, 6))
        assert same(fused_linear(x[1, 2], weight, bias), flat[5])
        assert same(fused_linear(x.transpose(0, 1), weight, bias), flat.view(4, 3, 6).transpose(0, 1))
        turned, gaps = weight.t().contiguous().t(), torch.full((6, 50), math.nan)
        gaps[:, ::2][:, :20] = weight
        for other in (turned, gaps[:, ::2][:, :20], torch.cat([weight, weight], 1)[:, 20:]):
            assert same(fused_linear(x, other, bias), flat.view(4, 3, 6))
        wide = random(12, 40)
        assert same(fused_linear(wide[:, ::2], weight), fused_linear(wide[:, ::2].contiguous(), weight))
        leaf = weight.clone().requires_grad_()
        fused_linear(x, leaf.t().contiguous().t(), bias).sum().backward()  # an expanded gradient
        torch.testing.assert_close(leaf.grad, x.sum((0, 1)).expand(6, 20), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("native" not in ON_CPU, reason="PyTorch's rows depend on how many they are")
@pytest.mark.parametrize("dtype", NARROW)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, weight, bias = layer(131, 70, 66, dtype)
    with ops.use("native"):
        together = fused_linear(x, weight, bias, activation="gelu")
        for rows in ([0], [3, 64], list(range(17)), list(range(60, 131))):
            assert torch.equal(fused_linear(x[rows], weight, bias, activation="gelu"), together[rows])


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty(backend: str, activation: str | None) -> None:
    with ops.use(backend):
        weight, bias = random(6, 20).requires_grad_(), random(6).requires_grad_()
        for shape in ((0, 20), (2, 0, 20)):
            x = torch.empty(shape, requires_grad=True)
            out = fused_linear(x, weight, bias, activation=activation, dropout_p=0.5)
            assert out.shape == (*shape[:-1], 3 if activation == "swiglu" else 6)
            grads = torch.autograd.grad(out.sum(), (x, weight, bias))
            assert grads[0].shape == shape and not grads[1].any() and not grads[2].any()


@every_backend
@pytest.mark.parametrize("dtype", NARROW)
def test_no_inputs_or_outputs(backend: str, dtype: torch.dtype) -> None:
    with ops.use(backend):
        for m, k, n in ((3, 0, 4), (3, 5, 0), (0, 0, 0)):
            tensors = [torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype), torch.arange(float(n)).to(dtype)]
            out, *grads = results(fused_linear, tensors, torch.ones(m, n, dtype=dtype), activation="relu")
            assert torch.equal(out, tensors[2].expand(m, n) if k == 0 else torch.empty(m, n, dtype=dtype))
            assert not grads[0].any() and not grads[1].any() and grads[2].shape == (n,)


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", NARROW)
def test_poison_stays_in_its_row(backend: str, dtype: torch.dtype, activation: str | None) -> None:
    x, weight, bias = layer(9, 40, 34, dtype)
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    for bad in (math.nan, math.inf):
        poisoned = x.clone()
        poisoned[3, 7] = bad
        with ops.use(backend):
            out, clean = (fused_linear(t, weight, bias, activation=activation) for t in (poisoned, x))
            assert torch.equal(out[others].isfinite(), clean[others].isfinite())
            assert backend == "reference" or torch.equal(out[others], clean[others])
            if math.isnan(bad):
                assert out[3].isnan().all(), "the guard of a training run looks for it"
            leaf = poisoned.requires_grad_()
            (grad,) = torch.autograd.grad(fused_linear(leaf, weight, bias, activation=activation)[others].sum(), leaf)
            assert grad[others].isfinite().all()


# -- dropout -------------------------------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("p", (0.1, 0.5, 0.999))
def test_dropout_draws_a_seed_and_keeps_its_share(backend: str, p: float) -> None:
    x, weight, _ = layer(300, 16, 400)
    with ops.use(backend):
        whole = fused_linear(x, weight)
        torch.manual_seed(3)
        seed = seed_of_next_call()
        first = fused_linear(x, weight, dropout_p=p)
        assert not torch.equal(first, fused_linear(x, weight, dropout_p=p)), "every call draws anew"
        torch.manual_seed(3)
        assert torch.equal(first, fused_linear(x, weight, dropout_p=p))
    keep = kept(seed, p, 300, 400)
    assert torch.equal(first != 0, keep & (whole != 0))
    torch.testing.assert_close(first, torch.where(keep, whole / (1 - p), 0), rtol=1e-6, atol=0)
    assert abs(keep.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / keep.numel())
    state = torch.get_rng_state()
    fused_linear(x, weight, dropout_p=0.0)
    assert torch.equal(state, torch.get_rng_state()), "without dropout nothing is drawn"


# -- what is kept and what is asked for ------------------------------------------------------------------------------------------------
@every_backend
def test_only_what_asks_gets_a_gradient(backend: str) -> None:
    found = []
    for wanted in itertools.product((False, True), repeat=3):
        tensors = [t.requires_grad_(want) for t, want in zip(layer(5, 12, 8), wanted, strict=True)]
        with ops.use(backend):
            out = fused_linear(*tensors, activation="silu")
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.sum().backward()
        assert [t.grad is not None for t in tensors] == list(wanted)
        found.append([t.grad for t in tensors])
    for grads in found:
        assert all(grad is None or torch.equal(grad, whole) for grad, whole in zip(grads, found[-1], strict=True)), "none depends on which others are asked for"
    call, needs = op_module.prepare(*layer(5, 12, 8)), op_module.op.needs(True, False, False)
    chosen = next(b for b in op_module.op.backends if b.name == backend)
    nothing = op_module.Out(torch.empty(0), torch.empty(0))
    grads = chosen.backward(op_module.Out(torch.ones(5, 8), None), call, nothing, needs)
    assert grads[0] is not None and grads[1] is None and grads[2] is None, "what nobody asks for is not computed"


def saved_bytes(function: Any) -> int:
    """Of the tensors that autograd keeps, views of one storage once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values())


@every_backend
def test_what_the_backward_pass_keeps(backend: str) -> None:
    """Beside x and the weight: nothing without an activation, a bit an element for relu, the pre-activation for the others; no mask of the dropout."""
    m, k, n = 100, 64, 80
    x, weight, bias = (t.requires_grad_() for t in layer(m, k, n))
    operands = 4 * (m * k + n * k + n)
    with ops.use(backend):
        for activation, more in ((None, 0), ("relu", m * n // 8), ("gelu", 4 * m * n), ("silu", 4 * m * n), ("swiglu", 4 * m * n)):
            found = saved_bytes(lambda activation=activation: fused_linear(x, weight, bias, activation=activation, dropout_p=0.1))
            assert found <= operands + more + 64, (activation, found - operands)
        with torch.no_grad():
            assert FORWARD(x, weight, bias, None, "gelu", 0.0, torch.float32, False)[1].numel() == 0


@every_backend
def test_weights_that_change_are_never_stale(backend: str) -> None:
    """By whatever way: in place, through .data, by an optimiser, a state dict, a NumPy view; shared between layers and copied."""
    module = torch.nn.Linear(40, 24)
    x, leaf = random(33, 40), random(33, 40, seed=9).requires_grad_()

    def agrees() -> None:
        with ops.use(backend):
            for t in (x, leaf):
                out = fused_linear(t, module.weight, module.bias, activation="relu")
                torch.testing.assert_close(out, torch.relu(t @ module.weight.t() + module.bias), rtol=1e-5, atol=1e-5)
            want = ((leaf @ module.weight.t() + module.bias) > 0).float() @ module.weight
            torch.testing.assert_close(torch.autograd.grad(out.sum(), leaf)[0], want, rtol=1e-5, atol=1e-5)

    agrees()
    with torch.no_grad():
        module.weight.mul_(-2)
    agrees()
    module.weight.data.add_(1)
    agrees()
    module.weight.data = random(24, 40, seed=5)
    agrees()
    module.weight.data = random(24, 40, seed=6)
    agrees()
    module.weight.detach().numpy()[:] *= 3
    agrees()
    module.load_state_dict({"weight": random(24, 40, seed=7), "bias": random(24, seed=8)})
    agrees()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(2):
        fused_linear(x, module.weight, module.bias).sum().backward()
        optimizer.step()
        agrees()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        module.weight.zero_()
    agrees()
    with ops.use(backend):
        torch.testing.assert_close(fused_linear(x, twin.weight, twin.bias), twin(x), rtol=1e-5, atol=1e-5)
        shared = fused_linear(fused_linear(x, twin.weight, twin.bias) @ twin.weight, twin.weight)  # the gradients of both uses add up
        want = torch.autograd.grad((twin(x) @ twin.weight @ twin.weight.t()).sum(), twin.weight)[0]
        torch.testing.assert_close(torch.autograd.grad(shared.sum(), twin.weight)[0], want, rtol=1e-4, atol=1e-3)


def test_a_weight_changed_between_the_passes_is_refused() -> None:
    x, weight, _ = (t.requires_grad_() for t in layer(5, 12, 8))
    out = fused_linear(x, weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_backend
def test_gradients_accumulate(backend: str) -> None:
    x, weight, bias = layer(8, 12, 6)
    weight.requires_grad_()
    with ops.use(backend):
        for _ in range(3):
            fused_linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, 3 * x.sum(0).expand(6, 12), rtol=1e-5, atol=1e-5)


# -- inside PyTorch ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(activation: str | None) -> None:
    leaves = [t.requires_grad_() for t in layer(4, 5, 6, torch.float64)]
    for p in (0.0, 0.4):

        def function(*t: Tensor, p: float = p) -> Tensor:
            torch.manual_seed(0)
            return fused_linear(*t, activation=activation, dropout_p=p)

        assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", (torch.float64, *NARROW))
@pytest.mark.parametrize("options", [(False, None, 0.0), (True, "relu", 0.3), (True, "swiglu", 0.0)])
def test_opcheck(dtype: torch.dtype, options: tuple[bool, str | None, float]) -> None:
    has_bias, activation, p = options
    seed = torch.tensor([3, -4]) if p else None
    for rows in (5, 0) if dtype == torch.float32 else (5,):
        tensors = (random(rows, 30, dtype=dtype)[:, :20], random(6, 20, dtype=dtype), random(6, dtype=dtype) if has_bias else None, seed)
        for keep in (False, True):
            torch.library.opcheck(FORWARD, (*tensors, activation, p, dtype, keep))
        saved = FORWARD(*tensors, activation, p, dtype, True)[1]
        g = torch.ones(rows, 3 if activation == "swiglu" else 6, dtype=dtype)
        torch.library.opcheck(BACKWARD, (g, None, *tensors, saved, activation, p, dtype, True, [True, True, has_bias]))
        torch.library.opcheck(BACKWARD, (g, None, *tensors, saved, activation, p, dtype, True, [False, True, False]), test_utils="test_faketensor")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, self.weight, self.bias = (torch.nn.Parameter(t) for t in layer(1, 20, 6))

    def forward(self, x: Tensor) -> Tensor:
        return fused_linear(x, self.weight, self.bias, activation="swiglu")


def test_compile() -> None:
    module = Layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for lowered, shape in itertools.product((False, True), ((3, 20), (5, 20))):
        x = random(*shape).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if lowered else contextlib.nullcontext():
            outs = module(x), compiled(x)
        assert torch.equal(*outs)
        expected, got = (torch.autograd.grad(out.sum(), (x, module.weight, module.bias)) for out in outs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        with torch.no_grad():
            module.weight.mul_(1.5)
            assert torch.equal(compiled(x), module(x)), "a compiled module sees its weight as it is now"


def test_export_with_any_batch_and_length() -> None:
    module = Layer()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(module, (random(2, 3, 20),), dynamic_shapes=(sizes,))
    assert any(node.target is FORWARD for node in program.graph.nodes)
    for shape in ((5, 1, 20), (4, 7, 20)):
        assert torch.equal(program.module()(random(*shape)), module(random(*shape)))


@every_backend
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms(backend: str) -> None:
    for activation in ("relu", "swiglu"):
        with ops.use(backend):
            check_transforms(lambda *t, activation=activation: fused_linear(*t, activation=activation), layer(4, 9, 6), rtol=1e-4, atol=1e-5)


@every_backend
def test_threads_and_repeats_give_the_same_bits(backend: str) -> None:
    tensors, g = layer(1300, 70, 140), random(1300, 70, seed=3)  # several chunks, of sizes that depend on the number of threads
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads if backend == "native" else 1)
            torch.manual_seed(1)
            with ops.use(backend), torch.autocast("cpu", torch.bfloat16):
                found.append(results(fused_linear, tensors, g, activation="swiglu", dropout_p=0.2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in found for a, b in zip(run, found[0], strict=True))


def test_explain_and_use() -> None:
    tensors = layer(3, 20, 6)
    rows = {row.backend: row for row in ops.explain("fused_linear", *tensors, activation="relu")}
    assert not rows["reference"].reasons
    with ops.use("reference"):
        assert [row.backend for row in ops.explain("fused_linear", *tensors) if row.chosen] == ["reference"]


def test_wrong_arguments() -> None:
    x, weight, bias = layer(3, 20, 6)
    for error, message, call in (
        (TypeError, "x is torch.int64 and weight torch.float32; both must be floating", lambda: fused_linear(x.long(), weight)),
        (TypeError, "outside of autocast they must be of one dtype", lambda: fused_linear(x.bfloat16(), weight)),
        (ValueError, "weight is \\[6\\]; it must be \\[N, K\\]", lambda: fused_linear(x, bias)),
        (ValueError, "x is \\[3, 19\\]; its last dimension must be the weight's 20 inputs", lambda: fused_linear(x[:, :19], weight)),
        (ValueError, "x is \\[\\]", lambda: fused_linear(torch.tensor(1.0), weight)),
        (ValueError, "bias is \\[5\\]; it must be \\[6\\]", lambda: fused_linear(x, weight, random(5))),
        (TypeError, "bias is torch.int64", lambda: fused_linear(x, weight, torch.ones(6, dtype=torch.int64))),
        (ValueError, "activation is 'tanh', not None or one of relu", lambda: fused_linear(x, weight, activation="tanh")),
        (ValueError, "even number of outputs", lambda: fused_linear(x, random(5, 20), activation="swiglu")),
        (ValueError, "dropout_p must be in \\[0, 1\\), not 1", lambda: fused_linear(x, weight, dropout_p=1.0)),
        (TypeError, "dropout_p is a tensor that asks for a gradient", lambda: fused_linear(x, weight, dropout_p=torch.tensor(0.5).requires_grad_())),
        (ValueError, "x is on meta and weight on cpu", lambda: fused_linear(x.to("meta"), weight)),
        (ValueError, "bias is on meta", lambda: fused_linear(x, weight, bias.to("meta"))),
    ):
        with pytest.raises(error, match=message):
            call()
