"""A module that holds a quantised weight: what it computes, and what becomes of it when it is saved, loaded, moved, cast and copied."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cvmk import ops
from cvmk.nn import Linear, QuantizedLinear
from cvmk.ops.quantize import QuantizedWeight

KINDS: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "8 bits, smooth": {"smooth_scale": torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5},
    "8 bits, static": {"smooth_scale": torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5, "input_range": torch.tensor([5.0])},
    "4 bits": {"bits": 4, "group_size": 32},
    "4 bits, zeros and order": {"bits": 4, "symmetric": False, "order": torch.randperm(64, generator=torch.Generator().manual_seed(2))},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 20, bias=bias)


def make(kind: str, bias: bool = True) -> QuantizedLinear:
    return QuantizedLinear.from_linear(linear(bias), **KINDS[kind])


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 64)), generator=torch.Generator().manual_seed(3))


def same(one: QuantizedLinear, other: QuantizedLinear) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in mine)
    assert torch.equal(one(x()), other(x()))


# -- what it computes ----------------------------------------------------------------------------------------------------------------
@each_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu", "swiglu"])
def test_it_is_the_op(kind: str, bias: bool, activation: Any) -> None:
    options = {**KINDS[kind]}
    whole, smooth, span = linear(bias), options.pop("smooth_scale", None), options.pop("input_range", None)
    if options.pop("bits", 8) == 8:
        weight = ops.quantize_int8(whole.weight if smooth is None else whole.weight * smooth)
        expected = ops.int8_linear(x(2, 3, 64), weight, whole.bias, smooth_scale=smooth, input_range=span, activation=activation)
    else:
        weight = ops.quantize_int4(whole.weight, options.pop("group_size", 64), **options)
        expected = ops.int4_linear(x(2, 3, 64), weight, whole.bias, activation=activation)
    layer = make(kind, bias)
    assert torch.equal(layer(x(2, 3, 64), activation), expected)
    if activation is None:
        assert (layer(x()) - whole(x())).abs().max() < (0.4 if layer.bits == 4 else 0.02 if layer.activations == "token" else 0.04)


def test_it_stands_in_for_our_own_linear() -> None:
    torch.manual_seed(0)
    whole = Linear(64, (16, 16), residual_output=True).eval()
    layer = QuantizedLinear.from_linear(whole)
    assert not layer.training and (layer(x(), "swiglu") - whole(x(), "swiglu")).abs().max() < 0.1
    assert "in_features=64, out_features=32, bias=True, bits=8" in repr(layer) and "group_size=32" in repr(make("4 bits"))


def test_the_bias_learns_and_the_weight_does_not() -> None:
    layer = make("8 bits")
    layer(x()).sum().backward()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert layer.bias is not None and torch.equal(layer.bias.grad, torch.full((20,), 3.0))  # type: ignore[arg-type]
    frozen = linear()
    frozen.bias.requires_grad_(False)
    assert not QuantizedLinear.from_linear(frozen).bias.requires_grad  # type: ignore[union-attr]


@each_kind
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_compiles_and_exports(kind: str) -> None:
    layer = make(kind).requires_grad_(False)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x()), layer(x()))
    assert torch.equal(torch.export.export(layer, (x(),)).module()(x()), layer(x()))


# -- saved and loaded ------------------------------------------------------------------------------------------------------------------
@each_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backends", [("native", "reference"), ("reference", "native")])
def test_a_state_dict_is_canonical_and_loads_whatever_packs_the_weight(kind: str, bias: bool, backends: tuple[str, str]) -> None:
    """Another machine has other layouts: here, that of the CPU's kernels and none."""
    with ops.use(backends[0], "reference"):
        layer = make(kind, bias)
        whole = nn.ModuleDict({"fc": layer})
        state = whole.state_dict()
        weight = layer.weight
        expected = {f"fc.weight.{name}": tensor for name, tensor in weight.tensors().items()} | ({"fc.bias": layer.bias} if bias else {})
        expected |= {f"fc.{name}": vector for name in ("smooth_scale", "input_range") if (vector := getattr(layer, name)) is not None}
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
        assert state["fc.weight.values"].shape == ((20, 64) if layer.bits == 8 else (20, 32)) and state["fc.weight.scales"].dtype == torch.float32
    stored = safetensors.torch.load(safetensors.torch.save({key: tensor.contiguous() for key, tensor in state.items()}))
    with ops.use(backends[1], "reference"):
        options = {"bits": layer.bits, "group_size": layer.group_size if layer.bits == 4 else 64, "smooth": layer.smooth_scale is not None}
        options |= {"input_range": layer.input_range is not None}
        again = nn.ModuleDict({"fc": QuantizedLinear.empty(64, 20, bias, **options)})
        assert not again["fc"](torch.ones(1, 64)).any()
        again.load_state_dict(stored)
        if backends[1] == "native":
            assert again["fc"].weight.layout != "plain"
    with ops.use("reference"):
        same(again["fc"], layer)  # type: ignore[arg-type]


@each_kind
def test_copies_and_pickles(kind: str) -> None:
    layer = make(kind)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        same(again, layer)
        assert again.weight.layout == layer.weight.layout and again.weight.values.data_ptr() != layer.weight.values.data_ptr()
    with ops.use("reference"):
        elsewhere = pickle.loads(pickle.dumps(layer))
    assert elsewhere.weight.layout == "plain"
    tensors = list(elsewhere.weight.tensors().values())
    assert all(torch.equal(a, b) for a, b in zip(tensors, layer.weight.tensors().values(), strict=True))
    stream = io.BytesIO()
    torch.save({"model": nn.Sequential(layer), "weight": layer.weight}, stream)
    stream.seek(0)
    whole = torch.load(stream, weights_only=False)
    same(whole["model"][0], layer)


@each_kind
def test_a_weight_alone_is_pickled_in_its_canonical_form(kind: str) -> None:
    weight = make(kind).weight
    stream = io.BytesIO()
    torch.save({"w": weight}, stream)
    stream.seek(0)
    with ops.use("reference"):
        elsewhere = torch.load(stream, weights_only=True)["w"]
    assert elsewhere.layout == "plain" and torch.equal(elsewhere.dequantize(), weight.dequantize())
    again = pickle.loads(pickle.dumps(weight))
    assert again.layout == weight.layout and torch.equal(again.values, weight.values)
    for twin in (copy.copy(weight), copy.deepcopy(weight)):
        assert twin.layout == weight.layout and torch.equal(twin.values, weight.values)


def refused(layer: QuantizedLinear, state: dict[str, Tensor], match: str, strict: bool = True) -> None:
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=match):
        layer.load_state_dict(state, strict=strict)
    assert torch.equal(layer.weight.values, before.weight.values)


def test_states_that_do_not_fit_are_refused_with_the_reason() -> None:
    layer, four = make("8 bits"), make("4 bits")
    state = layer.state_dict()
    without = {key: tensor for key, tensor in state.items() if not key.startswith("weight.")}
    refused(layer, without, 'Missing key.*"weight.values", "weight.scales"')
    assert layer.load_state_dict(without, strict=False).missing_keys == ["weight.values", "weight.scales"]
    refused(layer, {key: tensor for key, tensor in state.items() if key != "weight.scales"}, "weight.scales is missing beside")
    refused(layer, {key: tensor for key, tensor in state.items() if key != "weight.scales"}, "weight.scales is missing beside", strict=False)
    refused(layer, {**state, "weight.steps": torch.ones(1)}, 'Unexpected key.*"weight.steps"')
    refused(layer, linear().state_dict(), "weight is one tensor, of a layer that is not quantised: .*from_linear")
    refused(layer, linear().state_dict(), "weight is one tensor", strict=False)
    refused(layer, four.state_dict(), r"a weight of 4 bits \[20, 64\] was given where the layer has a weight of 8 bits \[20, 64\]")
    wider = QuantizedLinear.from_linear(nn.Linear(96, 20)).state_dict()
    refused(layer, wider, r"a weight of 8 bits \[20, 96\] was given where the layer has a weight of 8 bits \[20, 64\]")
    refused(layer, QuantizedLinear.from_linear(nn.Linear(64, 21)).state_dict(), r"8 bits \[21, 64\] was given")
    refused(four, make("4 bits, zeros and order").state_dict(), "in groups of 64 was given where the layer has a weight of 4 bits .* in groups of 32")
    refused(layer, {**state, "weight.scales": state["weight.scales"].half()}, "scales is torch.float16; it must be float32")
    refused(layer, {**state, "weight.scales": state["weight.scales"] * torch.nan}, "scales holds an infinity or NaN")
    smooth = make("8 bits, smooth")
    refused(smooth, state, "smooth_scale is missing beside")
    refused(four, {**four.state_dict(), "smooth_scale": torch.ones(64)}, "smooth_scale goes with 8 bits")
    layer.load_state_dict(smooth.state_dict())
    same(layer, smooth)
    static = make("8 bits, static")
    refused(static, smooth.state_dict(), "input_range is missing beside")
    refused(smooth, static.state_dict(), "input_range goes with activations by one magnitude, and these are 'token'")


def test_arguments_that_do_not_fit_are_refused() -> None:
    weight = ops.quantize_int8(x(20, 64))
    four = ops.quantize_int4(x(20, 64))
    for error, words, call in (
        (TypeError, "weight is a Tensor; quantise it", lambda: QuantizedLinear(x(20, 64))),  # type: ignore[arg-type]
        (ValueError, r"bias is \[64\]; it must be \[20\]", lambda: QuantizedLinear(weight, torch.ones(64))),
        (TypeError, "bias is torch.int64", lambda: QuantizedLinear(weight, torch.ones(20).long())),
        (ValueError, r"smooth_scale is \[20\]; it must be \[64\]", lambda: QuantizedLinear(weight, smooth_scale=torch.ones(20))),
        (ValueError, "smooth_scale goes with 8 bits", lambda: QuantizedLinear(four, smooth_scale=torch.ones(64))),
        (ValueError, r"input_range is \[64\]; it must be \[1\]", lambda: QuantizedLinear(weight, input_range=torch.ones(64))),
        (ValueError, "activations are 'static', which need an input_range", lambda: QuantizedLinear(weight, activations="static")),
        (ValueError, "activations are 'token', which have no input_range", lambda: QuantizedLinear(weight, activations="token", input_range=torch.ones(1))),
        (ValueError, "activations are 'float', which have no input_range", lambda: QuantizedLinear(four, input_range=torch.ones(1))),
        (ValueError, "bits is 3, not 8 or 4", lambda: QuantizedLinear.from_linear(linear(), bits=3)),
        (ValueError, "multiple of group_size", lambda: QuantizedLinear.from_linear(nn.Linear(65, 3), bits=4)),
        (TypeError, "linear is a Embedding, not a torch.nn.Linear", lambda: QuantizedLinear.from_linear(nn.Embedding(3, 4))),  # type: ignore[arg-type]
        (ValueError, r"no weight of 4 bits is \[20, 64\] in groups of 48", lambda: QuantizedLinear.empty(64, 20, bits=4, group_size=48)),
        (ValueError, r"no weight of 8 bits is \[0, 64\]", lambda: QuantizedLinear.empty(64, 0)),
        (ValueError, r"a weight of 4 bits \[20, 64\] was given", lambda: setattr(QuantizedLinear(weight), "weight", four)),
    ):
        with pytest.raises(error, match=words):
            call()
    layer = QuantizedLinear(weight)
    other = ops.quantize_int8(x(20, 64) * 2)
    layer.weight = other
    assert torch.equal(layer(x()), ops.int8_linear(x(), other))


# -- moved and cast --------------------------------------------------------------------------------------------------------------------
CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to("cpu", torch.bfloat16),
    "type": lambda module: module.type(torch.float16),
}


@each_kind
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_leaves_the_weight(kind: str, cast: str) -> None:
    layer = make(kind)
    before, out = copy.deepcopy(layer.state_dict()), layer(x())
    whole = CASTS[cast](nn.Sequential(layer))
    after = whole[0].state_dict()
    for key, tensor in before.items():
        if key == "bias":
            assert after[key].dtype != torch.float32
        else:
            assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key
    assert whole[0].smooth_scale is None or whole[0].smooth_scale.dtype == torch.float32
    found = whole(x())
    assert found.dtype == torch.float32 and (found - out).abs().max() < 2e-2
    low = layer(x().to(layer.bias.dtype))  # type: ignore[union-attr]
    assert (low.float() - out).abs().max() < 0.1


@each_kind
def test_moved_to_a_device_without_memory_and_back(kind: str) -> None:
    layer = make(kind)
    state = layer.state_dict()
    meta = copy.deepcopy(layer).to("meta")
    assert meta.weight.device.type == "meta" and meta.weight.layout == "plain" and meta(x().to("meta")).shape == (3, 20)
    with pytest.raises(NotImplementedError, match="to_empty"):
        meta.to("cpu")
    filled = meta.to_empty(device="cpu")
    assert torch.isfinite(filled(x())).all() or filled.bias is not None  # the bias may be anything; no memory is read that is not the layer's
    filled.load_state_dict(state)
    same(filled, layer)
    with torch.device("meta"):
        options = {"bits": layer.bits, "group_size": layer.group_size if layer.bits == 4 else 64}
        planned = QuantizedLinear.empty(64, 20, **options, smooth=layer.smooth_scale is not None, input_range=layer.input_range is not None)
    planned.load_state_dict(state, assign=True)
    same(planned, layer)


def test_memory_is_shared_with_other_processes() -> None:
    layer = make("8 bits").share_memory()
    assert layer.weight.values.is_shared() and layer.weight.scales.is_shared()
    same(layer, make("8 bits"))


def test_the_weight_is_packed_as_the_kernels_want_it() -> None:
    layer = QuantizedLinear(ops.quantize_int8(x(20, 64)).plain())
    assert layer.weight.layout == layer.weight.pack().layout
    assert isinstance(layer.weight, QuantizedWeight) and layer.weight.nbytes == sum(buffer.nbytes for buffer in layer.buffers())


# -- activations by tokens -------------------------------------------------------------------------------------------------------------
def test_four_bits_times_rounded_rows() -> None:
    layer = QuantizedLinear.from_linear(linear(), bits=4, group_size=32, activations="token")
    plain = QuantizedLinear.from_linear(linear(), bits=4, group_size=32)
    scale = x().abs().amax(1, keepdim=True) / 127
    assert torch.allclose(layer(x()), plain((x() / scale).round() * scale), atol=1e-5) and not torch.equal(layer(x()), plain(x()))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.activations == "token" and torch.equal(other(x()), layer(x()))
    seen = x().requires_grad_()
    layer(seen).sum().backward()
    assert seen.grad is not None and torch.allclose(seen.grad, layer.weight.dequantize().sum(0).expand(3, -1), atol=1e-5)
    for bits, activations in ((8, "float"), (4, "static")):
        with pytest.raises(ValueError, match=f"activations is '{activations}', and a weight of {bits} bits has"):
            QuantizedLinear.from_linear(linear(), bits=bits, activations=activations)
