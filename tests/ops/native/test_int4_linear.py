"""The native int4_linear: every format and level against float64, one row like a thousand, threads that change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cvmk import ops
from cvmk.ops import native, quantize_int4
from cvmk.ops.quantize import QuantizedWeight

from ._linear import ACTIVATIONS, DTYPES, LEVELS, act, check, forget, level, memory_growth, random

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"the native library is not there: {native.reason()}")
SHAPES = [(1, 32, 1), (2, 96, 3), (3, 64, 16), (4, 160, 17), (5, 128, 70), (16, 128, 64), (17, 256, 66), (33, 96, 48), (65, 1184, 40), (150, 128, 34)]
LAW = torch.float64


def quantised(n: int, k: int, group: int, symmetric: bool, ordered: bool) -> QuantizedWeight:
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3)) if ordered else None
    return quantize_int4(random(n, k, seed=1), group, symmetric=symmetric, order=order)


@pytest.fixture(params=LEVELS)
def isa(request, monkeypatch):
    level(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_the_layout_is_undone_exactly(symmetric, ordered):
    for _, k, n in SHAPES:
        weight = quantised(n, k, 32, symmetric, ordered)
        plain, again = weight.plain(), weight.plain().pack()
        with ops.use("reference"):
            canonical = quantised(n, k, 32, symmetric, ordered)
        assert weight.layout == again.layout == "native_int4" and canonical.layout == "plain"
        for name, tensor in canonical.tensors().items():
            assert torch.equal(getattr(plain, name), tensor) and torch.equal(getattr(again, name), getattr(weight, name))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric,ordered", [(True, False), (False, True)])
def test_result(isa, shape, dtype, symmetric, ordered):
    m, k, n = shape
    for group in (32, 64, 128):
        if k % group:
            continue
        weight = quantised(n, k, group, symmetric, ordered)
        dense = weight.dequantize(LAW).numpy()
        for activation in ACTIVATIONS if group == 32 and m < 100 else (None, "swiglu"):
            if activation == "swiglu" and n % 2:
                continue
            bias = random(n, seed=2, dtype=dtype) if activation != "relu" else None
            x = random(m, k, dtype=dtype)
            forget()
            got = ops.int4_linear(x, weight, bias, activation=activation)
            with ops.use("reference"):
                peer = ops.int4_linear(x, weight.plain(), bias, activation=activation)
            y = x.double().numpy() @ dense.T + (0 if bias is None else bias.double().numpy())
            check(got, peer, act(y, activation), largest=abs(y).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k,group", [(640, 128), (992, 32), (1344, 64)])
def test_a_row_does_not_depend_on_the_others_or_on_threads(isa, dtype, k, group):
    weight, bias, x = quantised(98, k, group, False, False), random(98), random(300, k, dtype=dtype)
    together = ops.int4_linear(x, weight, bias, activation="swiglu")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (slice(0, 1), slice(7, 10), slice(3, 19), slice(0, 17), slice(100, 165), slice(0, 300)):
                assert torch.equal(ops.int4_linear(x[rows], weight, bias, activation="swiglu"), together[rows])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "k,n,ordered,activation",
    [(512, 530, False, "gelu"), (128, 2048, False, "relu"), (1088, 1100, False, None), (4096, 80, True, "silu"), (544, 550, True, "swiglu")],
)
def test_many_rows_are_the_few_ones(k, n, ordered, activation):
    """More rows, inputs and columns than stand at one time, in as many ways as they are divided, give the bits of twenty rows alone."""
    weight, bias, x = quantised(n, k, 32, False, ordered), random(n), random(1100, k, dtype=torch.bfloat16)
    together = ops.int4_linear(x, weight, bias, activation=activation)
    strided = ops.int4_linear(torch.cat((x, x), 1)[:, :k], weight, bias, activation=activation)
    assert torch.equal(strided, together)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for first in (0, 501, 1080):
                assert torch.equal(ops.int4_linear(x[first : first + 20], weight, bias, activation=activation), together[first : first + 20])
            for rows in (33, 65, 127, 129, 545):
                assert torch.equal(ops.int4_linear(x[:rows], weight, bias, activation=activation), together[:rows])
    finally:
        torch.set_num_threads(threads)


def test_single_weights_reach_their_places(isa):
    """With one weight that is not zero, only its output sees only its input."""
    for dtype in DTYPES:
        for n, k, order in ((0, 0, None), (17, 95, None), (33, 64, torch.arange(95, -1, -1)), (16, 33, None)):
            dense = torch.zeros(34, 96)
            dense[n, k] = 7.5
            x = torch.arange(1, 97, dtype=dtype).expand(3, 96) * torch.tensor([[1], [2], [-1]], dtype=dtype)
            got = ops.int4_linear(x, quantize_int4(dense, 32, order=order))
            expected = torch.zeros(3, 34, dtype=dtype)
            expected[:, n] = x[:, k] * 7  # 15 is the largest code: 7 steps of 1
            assert torch.equal(got, expected)


def test_strides_types_and_empties(isa):
    weight = quantised(34, 64, 32, True, False)
    for dtype in DTYPES:
        wide, bias = random(20, 200, dtype=dtype), random(34)
        dense = ops.int4_linear(wide[:, :64].contiguous(), weight, bias)
        assert torch.equal(ops.int4_linear(wide[:, :64], weight, bias), dense)
        assert torch.equal(ops.int4_linear(wide[:, 0:128:2], weight, bias), ops.int4_linear(wide[:, 0:128:2].contiguous(), weight, bias))
        assert torch.equal(ops.int4_linear(wide[:1, :64].expand(18, 64), weight, bias), dense[:1].expand(18, 34))
        assert torch.equal(ops.int4_linear(wide[:, :64], weight, bias.double()), dense)
        assert ops.int4_linear(random(0, 64, dtype=dtype), weight).shape == (0, 34)
        assert ops.int4_linear(random(2, 0, 64, dtype=dtype), weight, activation="swiglu").shape == (2, 0, 17)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_stays_in_its_row(isa, bad, dtype):
    weight, x = quantised(20, 96, 32, False, False), random(40, 96, dtype=dtype)
    poisoned = x.clone()
    poisoned[2, 95] = poisoned[35, 0] = bad
    got, clean = ops.int4_linear(poisoned, weight), ops.int4_linear(x, weight)
    others = [r for r in range(40) if r not in (2, 35)]
    assert not torch.isfinite(got[[2, 35]]).any() and torch.equal(got[others], clean[others])


def test_memory_is_the_outputs():
    """No dense weight and no temporary of the output's size: the highest memory grows by the output (64 MiB) and what the threads hold."""
    grown, with_temporary = memory_growth("int4_linear", "ops.quantize_int4(torch.randn(8192, 64), 64)")
    assert 60 << 20 < grown < 72 << 20, grown
    assert with_temporary > 120 << 20, "the measure would see a temporary"


def test_what_is_declined():
    x, weight = random(3, 64), quantised(6, 64, 32, True, False)
    assert [row.backend for row in ops.explain("int4_linear", x, weight) if row.chosen] == ["native"]
    rows = {row.backend: row for row in ops.explain("int4_linear", x, weight.plain())}
    assert "pack it with weight.pack()" in str(rows["native"]) and rows["reference"].chosen
    rows = {row.backend: row for row in ops.explain("int4_linear", x.double(), weight)}
    assert "float64" in str(rows["native"]) and rows["reference"].chosen
    assert np.isfinite(ops.int4_linear(x.double(), weight).numpy()).all()
