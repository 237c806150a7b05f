"""int8_linear against numpy: exact integers, the law's epilogue, straight-through gradients, and life inside PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cvmk import ops
from cvmk.ops import QuantizedWeight, int8_linear, quantize_int8
from cvmk.ops.reference import int8_linear as reference

FORWARD, BACKWARD = torch.ops.cvmk.int8_linear_forward.default, torch.ops.cvmk.int8_linear_backward.default
ACTIVATIONS = (None, "relu", "gelu", "silu", "swiglu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def smooth(columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random(columns, seed=7, dtype=dtype).abs() + 0.25


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


def oracle(x, weight, bias=None, smooth_scale=None, activation=None):
    """The law of the docstring: integers from float32 (float64) steps, products in int64, epilogue in float64. x is [M, K]."""
    acc = np.float64 if x.dtype == torch.float64 else np.float32
    u = x.to(torch.float64 if acc is np.float64 else torch.float32).numpy()
    if smooth_scale is not None:
        u = u * (acc(1) / smooth_scale.to(torch.float64 if acc is np.float64 else torch.float32).numpy())
    q, a = np.zeros(u.shape, np.int64), np.zeros(len(u))
    for m, row in enumerate(u):
        largest = acc(max(acc(2.0**-100), np.abs(row).max()))
        q[m] = np.clip(np.rint(row * (acc(127) / largest)), -127, 127)
        a[m] = largest
    p = q @ weight.plain().values.numpy().astype(np.int64).T
    y = p * (a[:, None] / 127) * weight.plain().scales.double().numpy()
    if bias is not None:
        y = y + bias.double().numpy()
    return q, p, act(y, activation)


# -- forward -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (3, 64, 6), (17, 129, 32), (16, 2047, 5), (64, 33, 65)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_integers_are_the_laws(shape, dtype):
    m, k, n = shape
    x, weight, scale = random(m, k, dtype=dtype), quantize_int8(random(n, k, seed=1)), smooth(k)
    for s in (None, scale):
        q, p, _ = oracle(x, weight, smooth_scale=s)
        values, scales = reference.quantize_rows(reference.smoothed(x, s))
        assert np.array_equal(values.numpy(), q) and scales.shape == (m, 1)
        product = reference.exact_product(values, weight.plain().values)
        assert product.dtype == torch.int32 and np.array_equal(product.numpy(), p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_given_range_saturates(dtype):
    """Every row by 127 / range, cut at 127: against numpy, with one input far beyond it, a row that is not finite, and a range of 0."""
    x, weight, scale = random(6, 40, dtype=dtype), quantize_int8(random(9, 40, seed=1)), smooth(40)
    x[1, 3], x[4, 2] = 1000.0, math.inf
    for s in (None, scale):
        u = reference.smoothed(x, s).numpy()
        for span in (0.5, 2.0, 0.0):
            largest = np.maximum(u.dtype.type(span), u.dtype.type(2.0**-100))
            q = np.clip(np.rint(u * (u.dtype.type(127) / largest)), -127, 127)
            expected = (q @ weight.plain().values.double().numpy().T) * (float(largest) / 127) * weight.plain().scales.double().numpy()
            got = int8_linear(x, weight, smooth_scale=s, input_range=torch.tensor([span], dtype=dtype), out_dtype=torch.float64)
            rows = [0, 1, 2, 3, 5]
            assert np.allclose(got.numpy()[rows], expected[rows], rtol=1e-5, atol=0) and bool(got[4].isnan().all())
            assert span == 0.0 or abs(q[1]).max() == 127
    whole = x[:4].double().requires_grad_()
    int8_linear(whole, weight, input_range=torch.tensor([0.5])).sum().backward()
    assert torch.allclose(whole.grad, weight.dequantize(torch.float64).sum(0).expand(4, 40)), "straight through, also where it saturates"


def test_what_a_range_must_be_and_who_takes_none():
    x, weight = random(2, 40), quantize_int8(random(9, 40, seed=1))
    for wrong, kind in ((torch.ones(2), ValueError), (torch.ones(1).int(), TypeError)):
        with pytest.raises(kind, match="input_range"):
            int8_linear(x, weight, input_range=wrong)
    text = str(ops.explain("int8_linear", x, weight, input_range=torch.ones(1)))
    assert text.count("measures the largest magnitude of each row") >= 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_result(activation, dtype, tolerance):
    x, weight = random(5, 48, dtype=dtype), quantize_int8(random(10, 48, seed=1))
    for bias in (None, random(10, seed=2, dtype=dtype)):
        for s in (None, smooth(48)):
            got = int8_linear(x, weight, bias, smooth_scale=s, activation=activation)
            expected = oracle(x, weight, bias, s, activation)[2]
            assert got.dtype == dtype and got.shape == expected.shape
            np.testing.assert_allclose(got.double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_rounds_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert reference.quantize_rows(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_close_to_the_float_layer():
    """The error of row m and output n is at most half a step of x times |w| plus half a step of w times |x|, plus their product."""
    x, w = random(6, 96), random(8, 96, seed=1)
    weight = quantize_int8(w)
    step_x, step_w = x.abs().amax(1, keepdim=True) / 127, weight.plain().scales
    bound = step_x / 2 * w.abs().sum(1) + step_w / 2 * x.abs().sum(1, keepdim=True) + step_x * step_w / 4 * 96
    assert ((int8_linear(x, weight) - x @ w.t()).abs() <= bound).all()


def test_smooth_quant_keeps_the_layer():
    """The weight times the scale and x over it is the same layer, and a better one where an input is an outlier."""
    x, w = random(16, 64), random(8, 64, seed=1)
    x[:, 3] *= 100
    scale = x.abs().amax(0).sqrt() / w.abs().amax(0).sqrt()
    exact = x.double() @ w.double().t()
    plain = (int8_linear(x, quantize_int8(w)) - exact).abs().mean()
    smoothed = (int8_linear(x, quantize_int8(w * scale), smooth_scale=scale) - exact).abs().mean()
    assert smoothed < plain / 3


def test_leading_dimensions_strides_and_out_dtype():
    weight, x = quantize_int8(random(6, 20)), random(4, 3, 20)
    flat = int8_linear(x.reshape(12, 20), weight)
    assert torch.equal(int8_linear(x, weight), flat.view(4, 3, 6))
    assert torch.equal(int8_linear(x[1, 2], weight), flat[5])
    assert torch.equal(int8_linear(x.transpose(0, 1), weight), flat.view(4, 3, 6).transpose(0, 1))
    assert torch.equal(int8_linear(random(12, 40)[:, ::2], weight), int8_linear(random(12, 40)[:, ::2].contiguous(), weight))
    assert torch.equal(int8_linear(x[:1, :1].expand(2, 5, 20), weight), flat[:1].expand(2, 5, 6))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        got = int8_linear(x, weight, out_dtype=dtype)
        assert got.dtype == dtype and torch.equal(got, flat.view(4, 3, 6).to(dtype))


def test_strided_weights():
    wide, x = quantize_int8(random(8, 40)).plain(), random(3, 20)
    strided = QuantizedWeight(wide.values[:, ::2], wide.scales, None, None, 8, 20, 8, 20)
    dense = QuantizedWeight(wide.values[:, ::2].contiguous(), wide.scales, None, None, 8, 20, 8, 20)
    assert torch.equal(int8_linear(x, strided), int8_linear(x, dense))
    one = QuantizedWeight(wide.values[:1].expand(32, 40), wide.scales[:1].expand(32), None, None, 32, 40, 8, 40)
    assert torch.equal(int8_linear(random(3, 40), one), int8_linear(random(3, 40), quantize_int8(wide.dequantize()[:1].expand(32, 40))))


def test_a_row_does_not_depend_on_the_others():
    weight, x = quantize_int8(random(33, 70)), random(65, 70)
    together = int8_linear(x, weight, activation="gelu")
    for rows in ([0], [3, 64], list(range(17))):
        assert torch.equal(int8_linear(x[rows], weight, activation="gelu"), together[rows])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty_batches(activation):
    weight, bias = quantize_int8(random(6, 20)), random(6).requires_grad_()
    for shape in ((0, 20), (2, 0, 20)):
        x = torch.empty(shape, requires_grad=True)
        out = int8_linear(x, weight, bias, activation=activation)
        assert out.shape == (*shape[:-1], 3 if activation == "swiglu" else 6)
        grads = torch.autograd.grad(out.sum(), (x, bias))
        assert grads[0].shape == shape and torch.equal(grads[1], torch.zeros(6))


def test_rows_of_zeros_and_of_almost_zeros():
    weight, bias = quantize_int8(random(6, 20)), random(6)
    x = torch.zeros(3, 20)
    x[1], x[2] = 1e-45, 1e-36
    out = int8_linear(x, weight, bias)
    assert torch.equal(out, bias.expand(3, 6))
    alone = int8_linear(x, weight)
    assert reference.quantize_rows(torch.tensor([[2.0**-101], [2.0**-110], [0.0]]))[0].tolist() == [[64], [0], [0]], "the floor is 2^-100"
    assert torch.isfinite(alone).all() and not alone[:2].any()
    x = torch.full((1, 20), 3e38)
    assert torch.isfinite(int8_linear(x * 1e-6, weight)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_poison_stays_in_its_row(bad, activation):
    weight, bias, x = quantize_int8(random(6, 20)), random(6), random(4, 20)
    poisoned = x.clone()
    poisoned[2, 3] = bad
    assert not reference.quantize_rows(poisoned)[0][2].any()
    out, clean = int8_linear(poisoned, weight, bias, activation=activation), int8_linear(x, weight, bias, activation=activation)
    assert out[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(out[others], clean[others])
    grads = []
    for t in (poisoned, x):
        t.requires_grad_()
        grads.append(torch.autograd.grad(int8_linear(t, weight, bias, activation=activation)[others].sum(), t)[0])
    assert torch.equal(grads[0][others], grads[1][others])


def test_many_rows_are_taken_in_pieces(monkeypatch):
    weight, bias, x = quantize_int8(random(6, 20)), random(6), random(300, 20)
    with ops.use("reference"):
        whole = int8_linear(x, weight, bias, activation="swiglu")
        monkeypatch.setattr(reference, "_PIECE_ELEMENTS", 0)
        assert torch.equal(int8_linear(x, weight, bias, activation="swiglu"), whole)


# -- exact integers ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("native", [True, False])
def test_sums_are_exact_at_the_extremes(native, monkeypatch):
    """The largest sums, and random ones, through `_int_mm` where it is exact and through float32 pieces."""
    if native and not reference._int_mm_is_exact():
        pytest.skip("torch._int_mm saturates on this CPU, so the reference does not use it")
    monkeypatch.setattr(reference, "_int_mm_is_exact", lambda: native)
    generator = np.random.default_rng(0)
    for m, k, n in ((1, 133144, 2), (3, 4099, 4), (20, 1025, 9), (2, 1024, 1)):
        for values in (np.full((m, k), 127), np.full((m, k), -127), generator.integers(-127, 128, (m, k))):
            weight = np.where(np.arange(n)[:, None] % 2 == 0, 127, generator.integers(-127, 128, (n, k)))
            got = reference.exact_product(torch.from_numpy(values).to(torch.int8), torch.from_numpy(weight).to(torch.int8))
            assert got.dtype == torch.int32 and np.array_equal(got.numpy(), values @ weight.T)


def test_both_ways_agree(monkeypatch):
    weight, x = quantize_int8(random(9, 1500)), random(6, 1500)
    with ops.use("reference"):
        first = int8_linear(x, weight)
        monkeypatch.setattr(reference, "_int_mm_is_exact", lambda: False)
        assert torch.equal(int8_linear(x, weight), first)


# -- gradients -----------------------------------------------------------------------------------------------------------------------------
def straight_through(x, weight, bias, smooth_scale, activation):
    """activation(y) where y has the quantised layer's value and the dequantised layer's derivative."""
    wide = weight.dequantize(torch.float64).to(x.dtype)
    u = x if smooth_scale is None else x / smooth_scale
    path = u @ wide.t()
    value = torch.from_numpy(oracle(x.detach(), weight, None, smooth_scale)[2]).to(x.dtype)
    y = path + (value - path).detach()
    y = y if bias is None else y + bias
    if activation == "swiglu":
        gate, up = y.chunk(2, 1)
        return torch.nn.functional.silu(gate) * up
    return y if activation is None else getattr(torch.nn.functional, activation)(y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", [(False, False), (True, False), (True, True)])
def test_first_and_second_derivatives_are_straight_through(activation, options):
    double = torch.float64
    weight = quantize_int8(random(6, 10))
    x = random(4, 10, seed=1, dtype=double).requires_grad_()
    bias = random(6, seed=2, dtype=double).requires_grad_() if options[0] else None
    s = smooth(10, double) if options[1] else None
    leaves = [t for t in (x, bias) if t is not None]
    results = []
    for function in (
        lambda: int8_linear(x, weight, bias, smooth_scale=s, activation=activation),
        lambda: straight_through(x, weight, bias, s, activation),
    ):
        out = function()
        g = random(*out.shape, seed=3, dtype=double).requires_grad_()
        first = torch.autograd.grad(out, leaves, g, create_graph=True)
        total = sum((f * random(*f.shape, seed=4, dtype=double)).sum() for f in first)
        second = torch.autograd.grad(total, [g, *leaves], allow_unused=True)
        results.append([out, *first, *second])
    for got, expected in zip(*results, strict=True):
        got, expected = (torch.zeros(()) if t is None else t.detach() for t in (got, expected))
        torch.testing.assert_close(got.to(double), expected.to(double).expand_as(got), rtol=1e-12, atol=1e-12)


def test_bias_and_output_gradient_pass_gradcheck():
    """What is smooth in the quantised layer: the bias, and the gradient as a function of the incoming one."""
    weight, x = quantize_int8(random(6, 10)), random(3, 10, dtype=torch.float64)
    bias = random(6, seed=2, dtype=torch.float64).requires_grad_()
    for activation in (None, "gelu", "silu", "swiglu"):

        def function(b, activation=activation):
            return int8_linear(x, weight, b, activation=activation)

        assert gradcheck(function, (bias,)) and gradgradcheck(function, (bias,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_narrow_dtypes(dtype):
    """At most three times the error of the same layer with the dequantised weight in the same dtype, against float64."""
    weight = quantize_int8(random(24, 40) / 6)
    x, bias, g = random(16, 40, seed=1, dtype=dtype), random(24, seed=2, dtype=dtype), random(16, 24, seed=3, dtype=dtype)

    def grads(to, function):
        leaves = [t.to(to).requires_grad_() for t in (x, bias)]
        return torch.autograd.grad(function(*leaves), leaves, g.to(to))

    def dense(t, b):
        return torch.nn.functional.silu(torch.nn.functional.linear(t, weight.dequantize(t.dtype), b))

    def quantised(t, b):
        return int8_linear(t, weight, b, activation="silu")

    exact = grads(torch.float64, lambda t, b: straight_through(t, weight, b, None, "silu"))
    dense_exact = grads(torch.float64, dense)
    for got, peer, truth, peer_truth in zip(grads(dtype, quantised), grads(dtype, dense), exact, dense_exact, strict=True):
        assert got.dtype == dtype
        error, allowed = (got.double() - truth).abs().max(), (peer.double() - peer_truth).abs().max()
        assert error <= 3 * allowed + 1e-7, (error, allowed)


def test_only_what_asks_gets_a_gradient():
    weight = quantize_int8(random(6, 20))
    x, bias, s = random(3, 20), random(6).requires_grad_(), smooth(20).requires_grad_()
    out = int8_linear(x, weight, bias, smooth_scale=s)
    out.sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 3.0)) and s.grad is None
    assert not int8_linear(x, weight, smooth_scale=s).requires_grad


def test_out_dtype_gradient():
    weight, x = quantize_int8(random(6, 20)), random(3, 20, dtype=torch.bfloat16).requires_grad_()
    out = int8_linear(x, weight, random(6), out_dtype=torch.float32)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.float(), weight.dequantize().sum(0).expand(3, 20), rtol=2e-2, atol=2e-2)


# -- inside PyTorch -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [(False, False, None), (True, True, "gelu"), (True, False, "swiglu")])
def test_opcheck(dtype, options):
    has_bias, has_smooth, activation = options
    weight = quantize_int8(random(6, 20)).plain()
    bias, s = random(6, dtype=dtype) if has_bias else None, smooth(20) if has_smooth else None
    for rows in (5, 0) if dtype == torch.float32 else (5,):
        vectors = bias, s, torch.ones(1) if has_smooth else None
        arguments = (random(rows, 30, dtype=dtype)[:, :20], weight.values, weight.scales, *vectors, "plain", 6, activation, torch.bfloat16)
        torch.library.opcheck(FORWARD, arguments)
        g = torch.ones(rows, 3 if activation == "swiglu" else 6, dtype=torch.bfloat16)
        torch.library.opcheck(BACKWARD, (g, *arguments, [True, has_bias]))
        torch.library.opcheck(BACKWARD, (g, *arguments, [False, has_bias]), test_utils="test_faketensor")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = quantize_int8(random(6, 20))
        self.bias = torch.nn.Parameter(random(6))
        self.register_buffer("smooth_scale", smooth(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return int8_linear(x, self.weight, self.bias, smooth_scale=self.smooth_scale, activation="swiglu")


def test_compile():
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 20), (5, 20)):
        x = random(*shape).requires_grad_()
        expected = torch.autograd.grad(layer(x).sum(), (x, layer.bias))
        got = torch.autograd.grad(compiled(x).sum(), (x, layer.bias))
        assert torch.equal(compiled(x), layer(x)) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_export_with_any_batch_and_length():
    layer = Layer()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(layer, (random(2, 3, 20),), dynamic_shapes=(sizes,))
    assert any(node.target is FORWARD for node in program.graph.nodes)
    for shape in ((5, 1, 20), (4, 7, 20)):
        assert torch.equal(program.module()(random(*shape)), layer(random(*shape)))


def test_a_weight_made_of_buffers():
    """A module may keep the tensors as buffers and put the weight together in its forward."""
    weight, x = quantize_int8(random(6, 20)).plain(), random(3, 20)

    class FromBuffers(torch.nn.Module):
        def forward(self, x, values, scales):
            return int8_linear(x, QuantizedWeight(values, scales, None, None, 6, 20, 8, 20))

    program = torch.export.export(FromBuffers(), (x, weight.values, weight.scales), strict=True)
    assert torch.equal(program.module()(x, weight.values, weight.scales), int8_linear(x, weight))


def test_autocast():
    weight, x, bias = quantize_int8(random(6, 20)), random(3, 20).requires_grad_(), random(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = int8_linear(x, weight, bias)
        wide = int8_linear(x, weight, bias, out_dtype=torch.float32)
        exact = int8_linear(x.detach().double(), weight)
    assert out.dtype == torch.bfloat16 and wide.dtype == torch.float32 and exact.dtype == torch.float64
    assert torch.equal(out, int8_linear(x.bfloat16(), weight, bias))
    out.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_explain_and_use():
    weight, x = quantize_int8(random(6, 20)), random(3, 20)
    rows = {row.backend: row for row in ops.explain("int8_linear", x, weight, activation="relu")}
    assert not rows["reference"].reasons
    with ops.use("reference"):
        assert [row.backend for row in ops.explain("int8_linear", x, weight) if row.chosen] == ["reference"]


def test_repeats_bit_for_bit():
    weight = quantize_int8(random(33, 70))
    x, bias = random(20, 70).requires_grad_(), random(33).requires_grad_()
    with ops.use("reference"):
        runs = []
        for _ in range(5):
            out = int8_linear(x, weight, bias, activation="gelu")
            runs.append([out.detach(), *torch.autograd.grad(out.square().sum(), (x, bias))])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_wrong_arguments():
    weight, x = quantize_int8(random(6, 20)), random(3, 20)
    for error, message, call in (
        (TypeError, "weight is a Tensor; make a QuantizedWeight with ops.quantize_int8", lambda: int8_linear(x, random(6, 20))),
        (ValueError, "4 bits; use ops.int4_linear", lambda: int8_linear(random(3, 32), ops.quantize_int4(random(6, 32), 32))),
        (TypeError, "x is torch.int64", lambda: int8_linear(x.long(), weight)),
        (ValueError, "x is \\[3, 19\\].* 20 inputs", lambda: int8_linear(x[:, :19], weight)),
        (ValueError, "x is \\[\\]", lambda: int8_linear(torch.tensor(1.0), weight)),
        (ValueError, "bias is \\[5\\]; it must be \\[6\\]", lambda: int8_linear(x, weight, random(5))),
        (ValueError, "bias is \\[6, 1\\]", lambda: int8_linear(x, weight, random(6, 1))),
        (TypeError, "bias is torch.int64", lambda: int8_linear(x, weight, torch.ones(6, dtype=torch.int64))),
        (ValueError, "smooth_scale is \\[6\\]; it must be \\[20\\]", lambda: int8_linear(x, weight, smooth_scale=smooth(6))),
        (ValueError, "activation is 'tanh', not None or one of relu", lambda: int8_linear(x, weight, activation="tanh")),
        (ValueError, "even number of outputs", lambda: int8_linear(x, quantize_int8(random(5, 20)), activation="swiglu")),
        (TypeError, "out_dtype is torch.int8", lambda: int8_linear(x, weight, out_dtype=torch.int8)),
        (ValueError, "x is on meta and weight on cpu", lambda: int8_linear(x.to("meta"), weight)),
        (ValueError, "bias is on meta", lambda: int8_linear(x, weight, random(6).to("meta"))),
    ):
        with pytest.raises(error, match=message):
            call()
