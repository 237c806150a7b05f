"""`int4_linear` on the CPU library: one packed layout for one row and for a thousand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops.int4_linear import Call
from cvmk.ops.native import library
from cvmk.ops.native._linear import INPUT_TYPES, PANEL, pack_reasons, reason, result, rows_of, vector
from cvmk.ops.quantize import ACTIVATION_NUMBERS, PLAIN, Layout, QuantizedWeight, outputs

BLOCK = 128
"""Inputs that stand together."""


def pack(weight: QuantizedWeight) -> QuantizedWeight:
    """A canonical weight in the layout "native_int4" (`_linear` describes it)."""
    rows, inputs, groups = weight.out_features + -weight.out_features % PANEL, weight.in_features, weight.scales.shape[1]
    values = weight.values.new_empty(rows * (inputs + -inputs % BLOCK) // 2)
    scales, zeros = (None if like is None else like.new_empty(rows // PANEL, groups, PANEL) for like in (weight.scales, weight.zeros))
    assert scales is not None
    plain = (weight.values.contiguous(), weight.scales.contiguous(), None if weight.zeros is None else weight.zeros.contiguous())
    _NATIVE.pack_int4(*plain, values, scales, zeros, *weight.shape, groups)
    order = None if weight.order is None else weight.order.contiguous()
    return replace(weight, values=values, scales=scales, zeros=zeros, order=order, layout=LAYOUT.name)


def unpack(weight: QuantizedWeight) -> QuantizedWeight:
    """The inverse of `pack`."""
    rows, inputs, groups = weight.out_features, weight.in_features, weight.scales.shape[1]
    values = weight.values.new_empty(rows, inputs // 2)
    scales, zeros = (None if like is None else like.new_empty(rows, groups) for like in (weight.scales, weight.zeros))
    assert scales is not None
    _NATIVE.unpack_int4(weight.values, weight.scales, weight.zeros, values, scales, zeros, *weight.shape, groups)
    return replace(weight, values=values, scales=scales, zeros=zeros, layout=PLAIN)


LAYOUT = Layout("native_int4", 4, pack, unpack, pack_reasons)
LAYOUTS = (LAYOUT,)
_NATIVE: Any = library()


def forward(c: Call) -> Tensor:
    x = rows_of(c.x)
    out = result(x, outputs(c.out_features, c.activation), x.dtype)
    bias = c.bias
    if bias is not None:
        bias = vector(bias)
    _NATIVE.int4_linear(x, out, c.scales, bias, ACTIVATION_NUMBERS[c.activation], c.values, c.zeros, c.order, c.group_size)
    return out


def limits(which: str, c: Call) -> list[str]:
    return [] if c.layout == LAYOUT.name else [f"the weight is in the layout {c.layout!r}, not {LAYOUT.name!r}: pack it with weight.pack()"]


BACKENDS = (Backend("int4_linear", "native", forward, dtypes=INPUT_TYPES, devices=("cpu",), limits=limits, unavailable=reason),)
