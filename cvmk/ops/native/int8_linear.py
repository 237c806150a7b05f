"""`int8_linear` on the CPU library: rows quantised, multiplied, scaled and finished in one call; the layout of its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops.int8_linear import Call
from cvmk.ops.native import library
from cvmk.ops.native._linear import INPUT_TYPES, OUTPUT_TYPES, PANEL, pack_reasons, reason, result, rows_of, vector
from cvmk.ops.quantize import ACTIVATION_NUMBERS, PLAIN, Layout, QuantizedWeight, outputs

STEP = 64
"""Inputs of a tile."""


def _sizes(weight: QuantizedWeight) -> tuple[int, int]:
    """Elements of the packed values and scales."""
    rows = weight.out_features + -weight.out_features % PANEL
    return rows * (weight.in_features + -weight.in_features % STEP) + 4 * rows, rows + PANEL


def pack(weight: QuantizedWeight) -> QuantizedWeight:
    """A canonical weight in the layout "native_int8" (`_linear` describes it)."""
    values, scales = (like.new_empty(size) for like, size in zip((weight.values, weight.scales), _sizes(weight), strict=True))
    _NATIVE.pack_int8(weight.values.contiguous(), weight.scales.contiguous(), values, scales, *weight.shape)
    return replace(weight, values=values, scales=scales, layout=LAYOUT.name)


def unpack(weight: QuantizedWeight) -> QuantizedWeight:
    """The inverse of `pack`."""
    values, scales = weight.values.new_empty(weight.shape), weight.scales.new_empty(weight.out_features)
    _NATIVE.unpack_int8(weight.values, weight.scales, values, scales, *weight.shape)
    return replace(weight, values=values, scales=scales, layout=PLAIN)


LAYOUT = Layout("native_int8", 8, pack, unpack, pack_reasons)
LAYOUTS = (LAYOUT,)
_NATIVE: Any = library()


def forward(c: Call) -> Tensor:
    x = rows_of(c.x)
    out = result(x, outputs(c.out_features, c.activation), c.out_dtype)
    bias, smooth_scale = c.bias, c.smooth_scale
    if bias is not None:
        bias = vector(bias)
    if smooth_scale is not None:
        smooth_scale = vector(smooth_scale)
    _NATIVE.int8_linear(x, out, c.scales, bias, ACTIVATION_NUMBERS[c.activation], c.values, smooth_scale, c.input_range)
    return out


def limits(which: str, c: Call) -> list[str]:
    found = []
    if c.layout != LAYOUT.name:
        found.append(f"the weight is in the layout {c.layout!r}, not {LAYOUT.name!r}: pack it with weight.pack()")
    if c.out_dtype not in OUTPUT_TYPES:
        found.append(f"out_dtype is {c.out_dtype}, not one of {', '.join(map(str, OUTPUT_TYPES))}")
    return found


BACKENDS = (Backend("int8_linear", "native", forward, dtypes=INPUT_TYPES, devices=("cpu",), limits=limits, unavailable=reason),)
