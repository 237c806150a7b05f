"""Between the quantised weights of a model's file (see `stored`) and the layers that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cvmk.errors import DataError
from cvmk.formats.manifest import Scheme
from cvmk.formats.stored import EMBEDDINGS
from cvmk.formats.tensors import RawTensor
from cvmk.nn import CVMTransformer, QuantizedLinear, QuantizedTable
from cvmk.ops import QuantizedWeight


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers with quantised weights, by the weights' names."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[name if isinstance(module, QuantizedTable) else f"{name}.weight"] = module
    return found


def scheme_of(layer: QuantizedLinear) -> Scheme:
    """How a layer's weight is stored."""
    if layer.bits == 8:
        return Scheme("int8", {"activations": layer.activations})
    weight = layer.weight
    options = {"activations": layer.activations, "group": layer.group_size, "zeros": weight.zeros is not None, "order": weight.order is not None}
    return Scheme("int4", options)


def weight_schemes(model: nn.Module) -> dict[str, Scheme]:
    """The scheme of each weight of a model."""
    floats = {name: Scheme(str(tensor.dtype).removeprefix("torch.")) for name, tensor in floating(model).items()}
    return {**floats, **{name: scheme_of(layer) for name, layer in quantized_layers(model).items()}}


def original_size(model: nn.Module) -> int:
    """How many numbers the quantised weights stand for."""
    return sum(layer.in_features * layer.out_features for layer in quantized_layers(model).values())


def floating(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model without its quantised weights."""
    parts = {key for name, layer in quantized_layers(model).items() for key in _keys(name, layer)}
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in parts}


def dequantized(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict of a model in `dtype`, every quantised weight as the floats that it stands for, its smoothing scale in them, rounded once. That such a
    layer rounds activations too is not in them."""
    found = {name: tensor.to(dtype) for name, tensor in floating(model).items()}
    for name, layer in quantized_layers(model).items():
        wide = layer.weight.dequantize(torch.float64)
        found[name] = (wide if layer.smooth_scale is None else wide / layer.smooth_scale.double()).to(dtype)
    return found


def install(model: CVMTransformer, weights: Mapping[str, tuple[Scheme, Mapping[str, Tensor], RawTensor | None, RawTensor | None]]) -> None:
    """Put layers with these weights (scheme, canonical tensors, smoothing scale, input range) in the place of floating ones of the same names and sizes.
    Raises DataError, with the weight's name, where its numbers are none that such a weight has."""
    for name, (scheme, tensors, smooth, span) in weights.items():
        try:
            weight = QuantizedWeight.from_tensors(tensors)
        except ValueError as error:
            raise DataError(f"the quantised weight {name} is not sound ({error}): restore it or quantise the model again") from error
        scale, input_range = (_positive(name, what, raw) for what, raw in (("a smoothing scale", smooth), ("an input range", span)))
        replace_layer(model, name, weight, smooth_scale=scale, activations=str(scheme.options["activations"]), input_range=input_range)


def replace_layer(
    model: CVMTransformer,
    name: str,
    weight: QuantizedWeight,
    *,
    smooth_scale: Tensor | None = None,
    activations: str | None = None,
    input_range: Tensor | None = None,
) -> None:
    """Put a layer with a quantised weight in the place of the one whose weight has that name; its bias stays. Raises ValueError where the sizes differ."""
    if name.startswith(EMBEDDINGS):
        table = QuantizedTable(weight, activations=activations, input_range=input_range).to(next(model.decoder.norm.parameters()).dtype)
        model.embeddings.quantize(name.removeprefix(EMBEDDINGS), table)
        return
    path = name.removesuffix(".weight")
    parent = model.get_submodule(path.rpartition(".")[0])
    before: Any = model.get_submodule(path)
    if (before.out_features, before.in_features) != weight.shape:
        raise ValueError(f"{name} is [{before.out_features}, {before.in_features}] and the quantised weight {list(weight.shape)}")
    bias = before.bias if isinstance(before.bias, Tensor) else None
    layer = QuantizedLinear(weight, bias, smooth_scale=smooth_scale, activations=activations, input_range=input_range).train(before.training)
    setattr(parent, path.rpartition(".")[2], layer)


def _keys(name: str, layer: QuantizedLinear) -> list[str]:
    """The tensors of a layer's weight in the model's state dict."""
    vectors = [part for part in ("smooth_scale", "input_range") if getattr(layer, part) is not None]
    return [*(f"{name}.{part}" for part in layer.weight.tensors()), *(f"{name.removesuffix('.weight')}.{part}" for part in vectors)]


def _positive(name: str, what: str, raw: RawTensor | None) -> Tensor | None:
    found = None if raw is None else torch.from_numpy(raw.float32().copy())
    if found is not None and not (found.isfinite() & (found > 0)).all():
        raise DataError(f"the quantised weight {name} has {what} that is not positive and finite: restore it or quantise the model again")
    return found
