"""The native int8_linear: exact integers at every level, the law's epilogue, and rows that depend on nothing but themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cvmk import ops
from cvmk.ops import native, quantize_int8
from cvmk.ops.native import int8_linear as backend
from cvmk.ops.quantize import QuantizedWeight

from ._linear import ACTIVATIONS, DTYPES, LEVELS, act, check, forget, level, memory_growth, random

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"the native library is not there: {native.reason()}")
SHAPES = [(1, 1, 1), (2, 7, 3), (3, 64, 16), (4, 65, 17), (5, 100, 70), (16, 128, 64), (17, 130, 66), (33, 200, 48), (65, 1100, 40), (300, 70, 34)]


def oracle(x, weight, bias, smooth_scale, activation):
    """The law in numpy: integers from float32 steps, everything after them in float64."""
    u, plain = x.float().numpy(), weight.plain()
    if smooth_scale is not None:
        u = u * (np.float32(1) / smooth_scale.float().numpy())
    a = np.maximum(abs(u).max(1, keepdims=True), np.float32(2.0**-100))
    q = np.clip(np.rint(u * (np.float32(127) / a)), -127, 127).astype(np.int64)
    y = (q @ plain.values.numpy().astype(np.int64).T) * (a.astype(np.float64) / 127) * plain.scales.double().numpy()
    return act(y if bias is None else y + bias.double().numpy(), activation)


@pytest.fixture(params=LEVELS)
def isa(request, monkeypatch):
    level(monkeypatch, request.param)
    return request.param


def test_the_layout_is_undone_exactly():
    for _, k, n in SHAPES:
        weight = quantize_int8(random(n, k))
        plain = weight.plain()
        assert weight.layout == "native_int8" and plain.layout == "plain" and plain.values.shape == (n, k)
        assert torch.equal(plain.pack().values, weight.values) and torch.equal(plain.pack().scales, weight.scales)
        with ops.use("reference"):
            assert torch.equal(quantize_int8(random(n, k)).values, plain.values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_result(isa, shape, dtype):
    m, k, n = shape
    weight = quantize_int8(random(n, k, seed=1))
    for activation in ACTIVATIONS:
        if activation == "swiglu" and n % 2:
            continue
        for bias, s in ((None, None), (random(n, seed=2, dtype=dtype), random(k, seed=3).abs() + 0.25)):
            x = random(m, k, dtype=dtype)
            forget()
            got = ops.int8_linear(x, weight, bias, smooth_scale=s, activation=activation)
            with ops.use("reference"):
                peer = ops.int8_linear(x, weight.plain(), bias, smooth_scale=s, activation=activation)
            check(got, peer, oracle(x, weight, bias, s, activation))


def test_sums_are_exact_at_the_extremes(isa):
    """With scales of 1 and a row maximum of 127 the result is the int32 sum itself."""
    generator = np.random.default_rng(0)
    for m, k, n in ((1, 1030, 3), (3, 1030, 18), (20, 1030, 40), (40, 520, 33)):
        for case in ("largest", "lowest", "random"):
            w = {"largest": np.full((n, k), 127), "lowest": np.full((n, k), -127), "random": generator.integers(-127, 128, (n, k))}[case]
            x = np.full((m, k), -127) if case != "random" else generator.integers(-127, 128, (m, k))
            x[:, 0] = 127
            weight = QuantizedWeight(torch.from_numpy(w).to(torch.int8), torch.ones(n), None, None, n, k, 8, k).pack()
            got = ops.int8_linear(torch.from_numpy(x).float(), weight, out_dtype=torch.float64)
            assert weight.layout == "native_int8" and np.array_equal(got.numpy(), x @ w.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_by_a_given_range(isa, shape):
    """The reference's numbers, whatever goes beyond the range; rows that are not finite are NaN and touch no other."""
    m, k, n = shape
    weight = quantize_int8(random(n, k, seed=1))
    for dtype in DTYPES:
        for s in (None, random(k, seed=3).abs() + 0.25):
            for largest in (0.7, 3.0, 0.0):
                x = random(m, k, dtype=dtype)
                x[0, 0], x[m // 2, k - 1], span = 1e4, float("inf") if k % 2 else float("nan"), torch.tensor([largest])
                got = ops.int8_linear(x, weight, smooth_scale=s, input_range=span, out_dtype=torch.float32)
                with ops.use("reference"):
                    peer = ops.int8_linear(x, weight.plain(), smooth_scale=s, input_range=span, out_dtype=torch.float32)
                broken = torch.arange(m) == m // 2
                assert bool(got[broken].isnan().all()) and torch.allclose(got[~broken], peer[~broken], rtol=1e-6, atol=0)
                assert torch.equal(ops.int8_linear(x[:1], weight, smooth_scale=s, input_range=span, out_dtype=torch.float32), got[:1]) or m == 1


def test_rounds_half_to_even_and_once(isa):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    eye = QuantizedWeight(torch.eye(7, dtype=torch.int8), torch.ones(7), None, None, 7, 7, 8, 7).pack()
    assert ops.int8_linear(x, eye).tolist() == [[127, 0, 2, 2, 0, -2, 126]]
    # A fused multiply-add would round u * (127 / a) and the nearest integer at one time: these two steps differ from it.
    x = random(64, 999, seed=5)
    weight = QuantizedWeight(torch.eye(999, dtype=torch.int8), torch.ones(999), None, None, 999, 999, 8, 999).pack()
    a = x.abs().amax(1, keepdim=True)
    expected = (x * (torch.tensor(127.0) / a)).round() * (a / torch.full_like(a, 127))
    assert torch.equal(ops.int8_linear(x, weight), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_does_not_depend_on_the_others_or_on_threads(isa, activation):
    weight, bias, x = quantize_int8(random(98, 700)), random(98), random(1100, 700, dtype=torch.bfloat16)
    together = ops.int8_linear(x, weight, bias, activation=activation)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (slice(0, 1), slice(7, 10), slice(3, 19), slice(0, 17), slice(100, 165), slice(0, 1100)):
                assert torch.equal(ops.int8_linear(x[rows], weight, bias, activation=activation), together[rows])
    finally:
        torch.set_num_threads(threads)


def test_strides_types_and_empties(isa):
    weight, bias = quantize_int8(random(34, 40)), random(34)
    wide = random(9, 100, dtype=torch.bfloat16)
    dense = ops.int8_linear(wide[:, :40].contiguous(), weight, bias)
    assert torch.equal(ops.int8_linear(wide[:, :40], weight, bias), dense)
    assert torch.equal(ops.int8_linear(wide[:, 0:80:2], weight, bias), ops.int8_linear(wide[:, 0:80:2].contiguous(), weight, bias))
    assert torch.equal(ops.int8_linear(wide[:1, :40].expand(5, 40), weight, bias), dense[:1].expand(5, 34))
    full = ops.int8_linear(wide[:, :40], weight, bias, out_dtype=torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(ops.int8_linear(wide[:, :40], weight, bias, out_dtype=dtype), full.to(dtype))
        assert torch.equal(ops.int8_linear(wide[:, :40], weight, bias.to(dtype)), ops.int8_linear(wide[:, :40], weight, bias.to(dtype).float()))
    assert ops.int8_linear(random(0, 40), weight).shape == (0, 34)
    assert ops.int8_linear(random(2, 0, 40), weight, activation="swiglu").shape == (2, 0, 17)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_stays_in_its_row(isa, bad, dtype):
    weight, bias, x = quantize_int8(random(20, 70)), random(20), random(40, 70, dtype=dtype)
    for s in (None, random(70).abs() + 0.5):
        for activation in ACTIVATIONS:
            poisoned = x.clone()
            poisoned[2, 69] = poisoned[35, 0] = bad
            got = ops.int8_linear(poisoned, weight, bias, smooth_scale=s, activation=activation)
            clean = ops.int8_linear(x, weight, bias, smooth_scale=s, activation=activation)
            others = [r for r in range(40) if r not in (2, 35)]
            assert got[[2, 35]].isnan().all() and torch.equal(got[others], clean[others])


def test_rows_of_zeros_and_of_almost_zeros(isa):
    weight, bias = quantize_int8(random(6, 20)), random(6)
    x = torch.zeros(3, 20)
    x[1], x[2] = 1e-45, 1e-36
    assert torch.equal(ops.int8_linear(x, weight, bias), bias.expand(3, 6))
    assert not ops.int8_linear(x, weight)[:2].any()


def test_no_temporary_of_the_size_of_the_output():
    """The highest memory of the process grows by the output (64 MiB), the rows' bytes and what the threads hold, and no more."""
    grown, with_temporary = memory_growth("int8_linear", "ops.quantize_int8(torch.randn(8192, 64))")
    assert 60 << 20 < grown < 72 << 20, grown
    assert with_temporary > 120 << 20, "the measure would see a temporary"


def test_what_is_declined():
    x, weight = random(3, 20), quantize_int8(random(6, 20))
    assert [row.backend for row in ops.explain("int8_linear", x, weight) if row.chosen] == ["native"]
    rows = {row.backend: row for row in ops.explain("int8_linear", x, weight.plain())}
    assert "pack it with weight.pack()" in str(rows["native"]) and rows["reference"].chosen
    rows = {row.backend: row for row in ops.explain("int8_linear", x.double(), weight)}
    assert "float64" in str(rows["native"]) and rows["reference"].chosen
    assert not backend.pack(weight.plain()).values.is_floating_point()
