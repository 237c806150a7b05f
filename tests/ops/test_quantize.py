"""Quantised weights against loops over single numbers: values, errors, packing, checks, and life inside PyTorch."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils import _pytree

from cvmk import ops
from cvmk.ops import quantize
from cvmk.ops.quantize import Layout, QuantizedWeight, order_of_groups, pack_int4, quantize_int4, quantize_int8, unpack_int4


@pytest.fixture(autouse=True)
def canonical(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the canonical layout: no backend's own is known, except where a test brings one."""
    monkeypatch.setattr(quantize, "layouts", dict)


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[:, ::5] *= 10
    return values.to(dtype)


def nibble(values: torch.Tensor, n: int, k: int) -> int:
    """The 4-bit value of stored input k of row n, as the docstring defines it."""
    byte = int(values[n, k // 2])
    return byte % 16 if k % 2 == 0 else byte // 16


def dequantized(w: QuantizedWeight) -> np.ndarray:
    """The docstring's formula, one number at a time, in float64."""
    found = np.zeros(w.shape)
    for n in range(w.shape[0]):
        for k in range(w.shape[1]):
            if w.bits == 8:
                found[n, k] = int(w.values[n, k]) * float(w.scales[n])
                continue
            group = k // w.group_size
            zero = 8 if w.zeros is None else int(w.zeros[n, group])
            found[n, k if w.order is None else int(w.order[k])] = (nibble(w.values, n, k) - zero) * float(w.scales[n, group])
    return found


def permutation(columns: int) -> torch.Tensor:
    return torch.randperm(columns, generator=torch.Generator().manual_seed(1))


def four_bits() -> list[QuantizedWeight]:
    w = weight(5, 128)
    return [quantize_int4(w, g, symmetric=s, order=o) for g in (32, 64, 128) for s in (True, False) for o in (None, permutation(128))]


# -- 8 bits ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_int8_values_and_scales(dtype):
    w = weight(7, 33, dtype)
    w[3] = 0
    q = quantize_int8(w)
    assert q.values.dtype == torch.int8 and q.scales.dtype == torch.float32 and q.shape == (7, 33) and q.bits == 8 and q.group_size == 33
    wide = w.double().numpy()
    for n in range(7):
        largest = max(abs(v) for v in wide[n])
        scale = float(q.scales[n])
        assert scale == pytest.approx(largest / 127, rel=1e-6, abs=1e-37)
        for k in range(33):
            assert -127 <= int(q.values[n, k]) <= 127
            assert abs(int(q.values[n, k]) * scale - wide[n, k]) <= scale / 2 * (1 + 1e-5)
        assert largest == 0 or max(abs(int(v)) for v in q.values[n]) == 127
    assert not q.values[3].any() and torch.isfinite(q.scales).all()


def test_int8_rounds_half_to_even():
    w = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_int8(w).values.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_tiny_weights_stay_finite():
    for tiny in (1e-45, 1e-40, 1e-38):
        w = torch.full((1, 32), tiny)
        for q in (quantize_int8(w), quantize_int4(w, 32), quantize_int4(w, 32, symmetric=False)):
            assert torch.isfinite(q.dequantize()).all()
            assert (q.dequantize() - w).abs().max() <= 1.2e-38


# -- 4 bits ----------------------------------------------------------------------------------------------------------------------
def test_all_nibbles_in_both_places_round_trip():
    values = torch.tensor([[low, high] for low in range(16) for high in range(16)], dtype=torch.uint8).reshape(8, 64)
    packed = pack_int4(values)
    assert packed.shape == (8, 32) and packed.dtype == torch.uint8
    assert sorted(packed.flatten().tolist()) == list(range(256))
    for n in range(8):
        for k in range(64):
            assert nibble(packed, n, k) == int(values[n, k])
    assert torch.equal(unpack_int4(packed), values)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_error_is_at_most_half_a_step(group_size, symmetric):
    w = weight(9, 256)
    w[2] = w[2].abs() + 3
    w[4] = -w[4].abs() - 3
    w[5] = 0
    q = quantize_int4(w, group_size, symmetric=symmetric)
    assert q.scales.shape == (9, 256 // group_size) and (q.zeros is None) == symmetric and q.group_size == group_size and q.bits == 4
    steps = q.scales.double().repeat_interleave(group_size, 1)
    assert ((torch.from_numpy(dequantized(q)) - w.double()).abs() <= steps / 2 * (1 + 1e-5)).all()
    assert not dequantized(q)[5].any()
    for group in range(256 // group_size):
        part = w[0, group * group_size : (group + 1) * group_size]
        expected = part.abs().max() / 7.5 if symmetric else (part.max() - part.min()) / 15
        assert float(q.scales[0, group]) == pytest.approx(float(expected), rel=1e-6)


def test_zero_is_kept_exactly():
    w = weight(4, 64)
    w[:, 7::9] = 0
    for q in (quantize_int8(w), quantize_int4(w, 32), quantize_int4(w, 32, symmetric=False)):
        assert not q.dequantize()[:, 7::9].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_order_is_a_permuted_layer(symmetric):
    w, order = weight(6, 128), permutation(128)
    permuted = quantize_int4(w, 32, symmetric=symmetric, order=order)
    direct = quantize_int4(w[:, order], 32, symmetric=symmetric)
    assert torch.equal(permuted.values, direct.values) and torch.equal(permuted.scales, direct.scales)
    assert torch.equal(permuted.dequantize()[:, order], direct.dequantize())


def test_order_of_gptq_group_index():
    group_index = torch.tensor([1, 0, 2, 0, 1, 2])
    order = order_of_groups(group_index, 2)
    assert order.tolist() == [1, 3, 0, 4, 2, 5] and order.dtype == torch.int32
    with pytest.raises(ValueError, match="exactly 2 inputs"):
        order_of_groups(torch.tensor([0, 0, 0, 1]), 2)


def test_dequantize_is_the_formula():
    for q in [quantize_int8(weight(5, 31)), *four_bits()]:
        expected = torch.from_numpy(dequantized(q))
        assert torch.equal(q.dequantize(torch.float64), expected)
        assert torch.equal(q.dequantize(), expected.float())
        half = q.dequantize(torch.bfloat16)
        assert half.dtype == torch.bfloat16 and torch.equal(half, expected.float().bfloat16())


# -- tensors, pytree, devices ------------------------------------------------------------------------------------------------------
def test_tensors_round_trip():
    for q in [quantize_int8(weight(5, 31)), *four_bits()]:
        again = QuantizedWeight.from_tensors({name: tensor.clone() for name, tensor in q.tensors().items()})
        assert (again.shape, again.bits, again.group_size, again.layout) == (q.shape, q.bits, q.group_size, "plain")
        assert torch.equal(again.dequantize(), q.dequantize())


def test_nbytes():
    assert quantize_int8(weight(5, 31)).nbytes == 5 * 31 + 5 * 4
    assert quantize_int4(weight(6, 64), 32).nbytes == 6 * 32 + 6 * 2 * 4
    assert quantize_int4(weight(6, 64), 32, symmetric=False, order=permutation(64)).nbytes == 6 * 32 + 6 * 2 * 4 + 6 * 2 + 64 * 4


def test_pytree_and_copies():
    q = quantize_int4(weight(6, 64), 32, symmetric=False)
    leaves, spec = _pytree.tree_flatten(q)
    assert [leaf is None for leaf in leaves] == [False, False, False, True]
    again = _pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, QuantizedWeight) and again.shape == q.shape and torch.equal(again.dequantize(), q.dequantize())
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec
    assert torch.equal(copy.deepcopy(q).dequantize(), q.dequantize())
    assert q.to("cpu") is q
    meta = q.to("meta")
    assert meta.device.type == "meta" and meta.shape == q.shape
    assert "bits=4" in repr(q) and "tensor" not in repr(q)


def test_the_weight_is_not_the_original_and_has_no_gradient():
    w = weight(4, 64).requires_grad_()
    for q in (quantize_int8(w), quantize_int4(w, 32)):
        assert not any(tensor.requires_grad for tensor in q.tensors().values())
    before = w.detach().clone()
    quantize_int4(w, 32, symmetric=False)
    assert torch.equal(w.detach(), before)


def test_strided_weights():
    w = weight(64, 12)
    assert torch.equal(quantize_int8(w.t()).values, quantize_int8(w.t().contiguous()).values)
    assert torch.equal(quantize_int4(w.t(), 32).values, quantize_int4(w.t().contiguous(), 32).values)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantising_compiles():
    w = weight(6, 64)
    compiled = torch.compile(lambda t: (quantize_int8(t), quantize_int4(t, 32, symmetric=False)), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(w), (quantize_int8(w), quantize_int4(w, 32, symmetric=False)), strict=True):
        assert isinstance(got, QuantizedWeight) and torch.equal(got.values, expected.values) and torch.equal(got.scales, expected.scales)


# -- packed layouts ------------------------------------------------------------------------------------------------------------------
def column_major() -> Layout:
    def pack(w: QuantizedWeight) -> QuantizedWeight:
        return replace(w, values=w.values.t().contiguous().flatten(), layout="column_major")

    def unpack(w: QuantizedWeight) -> QuantizedWeight:
        return replace(w, values=w.values.view(w.in_features, w.out_features).t().contiguous(), layout="plain")

    return Layout("column_major", 8, pack, unpack, lambda w: [] if w.out_features % 2 == 0 else ["an odd number of outputs"])


def test_a_backend_layout(monkeypatch):
    plain = quantize_int8(weight(6, 20))
    found = {("native", "column_major"): column_major()}
    monkeypatch.setattr(quantize, "layouts", lambda: found)
    packed = quantize_int8(weight(6, 20))
    assert packed.layout == "column_major" and packed.values.dim() == 1 and packed.shape == (6, 20)
    assert packed.pack() is packed
    assert torch.equal(packed.dequantize(), plain.dequantize())
    assert torch.equal(packed.tensors()["values"], plain.values)
    assert packed.to("meta").layout == "column_major"
    x, bias = torch.randn(3, 20), torch.randn(6)
    assert torch.equal(ops.int8_linear(x, packed, bias), ops.int8_linear(x, plain, bias))
    x.requires_grad_()
    grads = [torch.autograd.grad(ops.int8_linear(x, w, activation="gelu").sum(), x)[0] for w in (packed, plain)]
    assert torch.equal(*grads)
    assert quantize_int8(weight(5, 20)).layout == "plain", "the layout declines an odd number of outputs"
    assert quantize_int4(weight(6, 32), 32).layout == "plain", "the layout is one for 8 bits"
    with ops.use("reference"):
        assert quantize_int8(weight(6, 20)).layout == "plain" and packed.pack().layout == "plain"
    monkeypatch.setattr(quantize, "layouts", dict)
    with pytest.raises(ValueError, match="'column_major'"):
        packed.dequantize()


# -- wrong arguments -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("function", [quantize_int8, quantize_int4])
def test_wrong_weights(function):
    with pytest.raises(TypeError, match="int64"):
        function(torch.ones(2, 64, dtype=torch.int64))
    for shape in ((64,), (0, 64), (2, 0), (2, 2, 64)):
        with pytest.raises(ValueError, match="must be \\[N, K\\]"):
            function(torch.ones(shape))
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = torch.ones(4, 64)
        w[2, 5] = bad
        with pytest.raises(ValueError, match="row 2"):
            function(w)
    with pytest.raises(ValueError, match="row 1"):
        function(torch.tensor([[1.0] * 64, [1e300] * 64], dtype=torch.float64))


def test_wrong_options():
    w = torch.ones(2, 96)
    with pytest.raises(ValueError, match="group_size is 48"):
        quantize_int4(w, 48)
    with pytest.raises(ValueError, match="96 inputs are no multiple of group_size 64"):
        quantize_int4(w, 64)
    with pytest.raises(ValueError, match="133144"):
        quantize_int8(torch.ones(1, 133145))
    with pytest.raises(ValueError, match="no permutation"):
        quantize_int4(w, 32, order=torch.zeros(96, dtype=torch.int64))
    with pytest.raises(ValueError, match="permutation of the 96"):
        quantize_int4(w, 32, order=torch.arange(95))


def bad_tensors() -> list[tuple[str, dict[str, torch.Tensor]]]:
    eight = quantize_int8(weight(4, 64)).tensors()
    four = quantize_int4(weight(4, 64), 32, symmetric=False, order=permutation(64)).tensors()
    return [
        ("got none", {}),
        ("got scales, values, weight", {**eight, "weight": torch.ones(1)}),
        ("values is \\[64\\]", {**eight, "values": eight["values"][0]}),
        ("scales is torch.float16", {**eight, "scales": eight["scales"].half()}),
        ("scales \\[4\\]", {**eight, "scales": eight["scales"][:3]}),
        ("neither zeros nor order", {**eight, "order": four["order"]}),
        ("-128", {**eight, "values": torch.full((4, 64), -128, dtype=torch.int8)}),
        ("133144", {"values": torch.zeros(1, 133145, dtype=torch.int8), "scales": torch.ones(1)}),
        ("values is torch.int32", {**four, "values": four["values"].int()}),
        ("scales is \\[4, 3\\]", {**four, "scales": torch.ones(4, 3)}),
        ("groups of 16", {"values": four["values"], "scales": torch.ones(4, 4)}),
        ("zeros is torch.int8", {**four, "zeros": four["zeros"].to(torch.int8)}),
        ("above 15", {**four, "zeros": four["zeros"] + 16}),
        ("infinity or NaN", {**four, "scales": four["scales"] * torch.nan}),
        ("no permutation", {**four, "order": four["order"] + 1}),
        ("on one device", {**eight, "scales": eight["scales"].to("meta")}),
    ]


@pytest.mark.parametrize("index", range(16))
def test_wrong_tensors(index):
    message, tensors = bad_tensors()[index]
    with pytest.raises(ValueError, match=message):
        QuantizedWeight.from_tensors(tensors)
