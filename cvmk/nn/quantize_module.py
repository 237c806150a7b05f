"""The linear layers of any module as quantised ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import nn

from cvmk.nn.linear import Linear
from cvmk.nn.quantized_linear import QuantizedLinear

SchemeName = Literal["w8a8", "w4a16", "w4a8"]


class Int8Linear(QuantizedLinear):
    """A `QuantizedLinear` of 8 bits. Raises ValueError for a weight of others."""

    BITS = 8


class Int4Linear(QuantizedLinear):
    """A `QuantizedLinear` of 4 bits; `cvmk.formats.read_gptq` and `read_awq` make such layers of checkpoints. Raises ValueError for a weight of others."""

    BITS = 4


def quantize_module(
    model: nn.Module, scheme: SchemeName = "w8a8", *, group_size: int = 64, symmetric: bool = True, skip: Callable[[str, nn.Linear], bool] | None = None
) -> nn.Module:
    """Put an `Int8Linear` or `Int4Linear`, rounded to nearest, in the place of every linear layer of a module, and return the module.

    scheme      "w8a8": weights in 8 bits by rows, inputs in 8 bits by rows. "w4a16": weights in 4 bits in groups, inputs as they are. "w4a8": both.
    group_size, symmetric   of 4 bits, as `ops.quantize_int4` has them.
    skip        says of a layer's name and the layer whether it stays.

    Layers whose class is not `torch.nn.Linear` or `cvmk.nn.Linear` itself stay, since they may compute something else; a layer that stands in several
    places is one layer still. Nothing is changed where something is raised: ValueError for an unknown scheme, and for a layer that groups do not divide.
    """
    if scheme not in get_args(SchemeName):
        raise ValueError(f"scheme is {scheme!r}, and must be one of {', '.join(get_args(SchemeName))}")
    made: dict[nn.Module, QuantizedLinear] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and type(layer) in (nn.Linear, Linear) and not (skip is not None and skip(name, layer)):
            try:
                made[layer] = _quantized(layer, scheme, group_size, symmetric)
            except ValueError as error:
                raise ValueError(f"{name or 'the layer'}: {error}; or let `skip` leave it out") from error
    if model in made:
        return made[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a layer's second place
            if child in made:
                setattr(parent, name, made[child])
    return model


def _quantized(layer: nn.Linear, scheme: SchemeName, group_size: int, symmetric: bool) -> QuantizedLinear:
    if scheme == "w8a8":
        return Int8Linear.from_linear(layer)
    return Int4Linear.from_linear(layer, bits=4, group_size=group_size, symmetric=symmetric, activations="float" if scheme == "w4a16" else "token")
