"""int4_linear against numpy: every format, gradients of both orders, bounded memory, and life inside PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cvmk import ops
from cvmk.ops import QuantizedWeight, int4_linear, quantize_int4
from cvmk.ops.reference import _quantized

FORWARD, BACKWARD = torch.ops.cvmk.int4_linear_forward.default, torch.ops.cvmk.int4_linear_backward.default
ACTIVATIONS = (None, "relu", "gelu", "silu", "swiglu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def quantised(rows: int, columns: int, group_size: int = 32, symmetric: bool = False, ordered: bool = True) -> QuantizedWeight:
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(3)) if ordered else None
    return quantize_int4(random(rows, columns, seed=1), group_size, symmetric=symmetric, order=order)


def formats(rows: int = 6, columns: int = 128) -> list[QuantizedWeight]:
    return [quantised(rows, columns, g, s, o) for g in (32, 64, 128) for s in (True, False) for o in (True, False)]


def dense(w: QuantizedWeight) -> np.ndarray:
    """The docstring's formula, one number at a time, in float64."""
    w, found = w.plain(), np.zeros(w.shape)
    for n in range(w.shape[0]):
        for k in range(w.shape[1]):
            byte = int(w.values[n, k // 2])
            q = byte % 16 if k % 2 == 0 else byte // 16
            zero = 8 if w.zeros is None else int(w.zeros[n, k // w.group_size])
            found[n, k if w.order is None else int(w.order[k])] = (q - zero) * float(w.scales[n, k // w.group_size])
    return found


def act(y: np.ndarray, activation: str | None) -> np.ndarray:
    sigmoid = 1 / (1 + np.exp(-y))
    if activation == "relu":
        return np.where(y > 0, y, 0)
    if activation == "gelu":
        return y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    if activation == "silu":
        return y * sigmoid
    if activation == "swiglu":
        half = y.shape[1] // 2
        return y[:, :half] * sigmoid[:, :half] * y[:, half:]
    return y


def oracle(x: torch.Tensor, w: QuantizedWeight, bias: torch.Tensor | None = None, activation: str | None = None) -> np.ndarray:
    y = x.double().numpy() @ dense(w).T
    return act(y if bias is None else y + bias.double().numpy(), activation)


# -- forward -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("index", range(12))
def test_every_format_in_float64(index):
    w, x, bias = formats()[index], random(5, 128, dtype=torch.float64), random(6, dtype=torch.float64)
    for activation in ACTIVATIONS:
        np.testing.assert_allclose(int4_linear(x, w, bias, activation=activation).numpy(), oracle(x, w, bias, activation), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 32, 1), (3, 64, 5), (17, 128, 33), (64, 96, 7)])
def test_narrow_dtypes(dtype, shape):
    """At most twice the error of F.linear with the float64 weight rounded to the dtype (three more ulps where both are tiny)."""
    m, k, n = shape
    x, w, bias = random(m, k, dtype=dtype), quantised(n, k), random(n, dtype=dtype)
    got, exact = int4_linear(x, w, bias), oracle(x, w, bias)
    peer = torch.nn.functional.linear(x, torch.from_numpy(dense(w)).to(dtype), bias)
    assert got.dtype == dtype and got.shape == (m, n)
    error, allowed = abs(got.double().numpy() - exact).max(), abs(peer.double().numpy() - exact).max()
    assert error <= 2 * allowed + 3 * torch.finfo(dtype).eps * abs(exact).max(), (error, allowed)


def test_activation_order_is_a_permutation_of_the_inputs():
    x, w = random(4, 64), quantised(6, 64).plain()
    unordered = QuantizedWeight(w.values, w.scales, w.zeros, None, 6, 64, 4, 32)
    assert torch.equal(int4_linear(x, w), int4_linear(x[:, w.order.long()], unordered))


def test_leading_dimensions_and_strides():
    w, x = quantised(6, 64), random(4, 3, 64)
    flat = int4_linear(x.reshape(12, 64), w)
    assert torch.equal(int4_linear(x, w), flat.view(4, 3, 6))
    torch.testing.assert_close(int4_linear(x[1, 2], w), flat[5])
    torch.testing.assert_close(int4_linear(x.transpose(0, 1), w), flat.view(4, 3, 6).transpose(0, 1))
    torch.testing.assert_close(int4_linear(random(5, 128)[:, ::2], w), int4_linear(random(5, 128)[:, ::2].contiguous(), w))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty_batches(activation):
    w, bias = quantised(6, 64), random(6).requires_grad_()
    for shape in ((0, 64), (2, 0, 64)):
        x = torch.empty(shape, requires_grad=True)
        out = int4_linear(x, w, bias, activation=activation)
        assert out.shape == (*shape[:-1], 3 if activation == "swiglu" else 6)
        grads = torch.autograd.grad(out.sum(), (x, bias))
        assert grads[0].shape == shape and torch.equal(grads[1], torch.zeros(6))


def test_poison_stays_in_its_row():
    w, x = quantised(6, 64), random(4, 64)
    x[2, 3] = float("nan")
    out = int4_linear(x, w, activation="silu")
    assert out[2].isnan().all() and torch.isfinite(out[[0, 1, 3]]).all()


@pytest.fixture
def only_reference():
    with ops.use("reference"):
        yield


def test_the_weight_is_never_dequantised_whole(monkeypatch, only_reference):
    """In pieces of rows the result is the same to rounding, in both directions, and no piece is above the bound."""
    w, bias = quantised(50, 64), random(50, dtype=torch.float64)
    x = random(5, 64, dtype=torch.float64).requires_grad_()
    whole = int4_linear(x, w, bias, activation="swiglu")
    whole_grad = torch.autograd.grad(whole.sum(), x)[0]
    sizes: list[int] = []

    def watched(weight, start, stop, dtype, real=_quantized.dequantized_rows):
        sizes.append((stop - start) * weight.in_features)
        return real(weight, start, stop, dtype)

    monkeypatch.setattr(_quantized, "CHUNK_ELEMENTS", 7 * 64)
    monkeypatch.setattr(_quantized, "dequantized_rows", watched)
    pieces = int4_linear(x, w, bias, activation="swiglu")
    pieces_grad = torch.autograd.grad(pieces.sum(), x)[0]
    assert len(sizes) == 3 * 8 and max(sizes) == 7 * 64
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pieces_grad, whole_grad, rtol=1e-12, atol=1e-12)


# -- gradients -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", [(True, False, False), (False, True, True)])
def test_gradcheck_and_gradgradcheck(activation, options):
    symmetric, ordered, has_bias = options
    w = quantised(4, 32, 32, symmetric, ordered)
    x = random(3, 32, seed=5, dtype=torch.float64).requires_grad_()
    bias = random(4, seed=6, dtype=torch.float64).requires_grad_() if has_bias else None

    def function(*leaves):
        return int4_linear(leaves[0], w, leaves[1] if has_bias else None, activation=activation)

    leaves = (x, bias) if has_bias else (x,)
    assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_narrow_dtypes(dtype):
    """At most three times the error of the dense layer in the same dtype, against float64."""
    w = quantised(24, 64)
    x, bias, g = random(16, 64, dtype=dtype) / 8, random(24, seed=2, dtype=dtype), random(16, 24, seed=3, dtype=dtype)

    def grads(to, function):
        leaves = [t.to(to).requires_grad_() for t in (x, bias)]
        return torch.autograd.grad(function(*leaves), leaves, g.to(to))

    def peer(t, b):
        return torch.nn.functional.gelu(torch.nn.functional.linear(t, torch.from_numpy(dense(w)).to(t.dtype), b))

    exact = grads(torch.float64, peer)
    ours, theirs = grads(dtype, lambda t, b: int4_linear(t, w, b, activation="gelu")), grads(dtype, peer)
    for got, other, truth in zip(ours, theirs, exact, strict=True):
        assert got.dtype == dtype
        error, allowed = (got.double() - truth).abs().max(), (other.double() - truth).abs().max()
        assert error <= 3 * allowed + 1e-7, (error, allowed)


def test_only_what_asks_gets_a_gradient():
    w, x, bias = quantised(6, 64), random(3, 64), random(6).requires_grad_()
    int4_linear(x, w, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 3.0)) and x.grad is None
    x.requires_grad_()
    (grad,) = torch.autograd.grad(int4_linear(x, w, bias.detach()).sum(), x)
    torch.testing.assert_close(grad, w.dequantize().sum(0).expand(3, 64))


# -- inside PyTorch --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [(True, False, False, None), (False, True, True, "gelu"), (False, False, True, "swiglu")])
def test_opcheck(dtype, options):
    symmetric, ordered, has_bias, activation = options
    w = quantised(6, 64, 32, symmetric, ordered).plain()
    bias = random(6, dtype=dtype) if has_bias else None
    for rows in (5, 0) if dtype == torch.float32 else (5,):
        arguments = (random(rows, 80, dtype=dtype)[:, :64], w.values, w.scales, w.zeros, w.order, bias, "plain", 6, 32, activation)
        torch.library.opcheck(FORWARD, arguments)
        g = torch.ones(rows, 3 if activation == "swiglu" else 6, dtype=dtype)
        torch.library.opcheck(BACKWARD, (g, *arguments, [True, has_bias]))
        torch.library.opcheck(BACKWARD, (g, *arguments, [False, has_bias]), test_utils="test_faketensor")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = quantised(6, 64)
        self.bias = torch.nn.Parameter(random(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return int4_linear(x, self.weight, self.bias, activation="swiglu")


def test_compile():
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 64), (5, 64)):
        x = random(*shape).requires_grad_()
        expected = torch.autograd.grad(layer(x).sum(), (x, layer.bias))
        got = torch.autograd.grad(compiled(x).sum(), (x, layer.bias))
        assert torch.equal(compiled(x), layer(x)) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_export_with_any_batch_and_length():
    layer = Layer()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(layer, (random(2, 3, 64),), dynamic_shapes=(sizes,))
    assert any(node.target is FORWARD for node in program.graph.nodes)
    for shape in ((5, 1, 64), (4, 7, 64)):
        assert torch.equal(program.module()(random(*shape)), layer(random(*shape)))


def test_autocast():
    w, x, bias = quantised(6, 64), random(3, 64).requires_grad_(), random(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = int4_linear(x, w, bias)
        exact = int4_linear(x.detach().double(), w)
    assert out.dtype == torch.bfloat16 and exact.dtype == torch.float64
    assert torch.equal(out, int4_linear(x.bfloat16(), w, bias.bfloat16()))
    out.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_explain_and_use():
    w, x = quantised(6, 64), random(3, 64)
    rows = {row.backend: row for row in ops.explain("int4_linear", x, w, activation="relu")}
    assert not rows["reference"].reasons
    with ops.use("reference"):
        assert [row.backend for row in ops.explain("int4_linear", x, w) if row.chosen] == ["reference"]


def test_repeats_bit_for_bit():
    w, x, bias = quantised(33, 96), random(20, 96).requires_grad_(), random(33).requires_grad_()
    with ops.use("reference"):
        runs = []
        for _ in range(5):
            out = int4_linear(x, w, bias, activation="gelu")
            runs.append([out.detach(), *torch.autograd.grad(out.square().sum(), (x, bias))])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_wrong_arguments():
    w, x = quantised(6, 64), random(3, 64)
    for error, message, call in (
        (TypeError, "make a QuantizedWeight with ops.quantize_int4", lambda: int4_linear(x, random(6, 64))),
        (ValueError, "8 bits; use ops.int8_linear", lambda: int4_linear(x, ops.quantize_int8(random(6, 64)))),
        (TypeError, "x is torch.int64", lambda: int4_linear(x.long(), w)),
        (ValueError, "x is \\[3, 63\\].* 64 inputs", lambda: int4_linear(x[:, :63], w)),
        (ValueError, "bias is \\[5\\]; it must be \\[6\\]", lambda: int4_linear(x, w, random(5))),
        (ValueError, "activation is 'tanh'", lambda: int4_linear(x, w, activation="tanh")),
        (ValueError, "even number of outputs", lambda: int4_linear(x, quantised(5, 64), activation="swiglu")),
        (ValueError, "x is on meta and weight on cpu", lambda: int4_linear(x.to("meta"), w)),
    ):
        with pytest.raises(error, match=message):
            call()
