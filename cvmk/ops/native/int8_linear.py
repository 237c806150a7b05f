"""`int8_linear` on the CPU library: rows quantised, multiplied, scaled and finished in one call; the layout of its weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.ops._backend import Backend
from cvmk.ops.int8_linear import Call
from cvmk.ops.native import library
from cvmk.ops.native._linear import INPUT_TYPES, OUTPUT_TYPES, PANEL, pack_reasons, panels, reason, result, rows_of, vector
from cvmk.ops.quantize import ACTIVATION_NUMBERS, PLAIN, Layout, QuantizedWeight, outputs

STEP = 64
"""Inputs of a tile."""


def pack(weight: QuantizedWeight) -> QuantizedWeight:
    """A canonical weight in the layout "native_int8" (`_linear` describes it)."""
    values = F.pad(weight.values, (0, -weight.in_features % STEP))
    tiles = panels(values).view(-1, PANEL, values.shape[1] // 4, 4).transpose(1, 2).contiguous()
    sums = panels(weight.values.sum(1, dtype=torch.int32)[:, None]).flatten() * -128
    scales = F.pad(weight.scales, (0, -weight.out_features % PANEL + PANEL))
    return replace(weight, values=torch.cat((tiles.flatten(), sums.view(torch.int8))), scales=scales, layout=LAYOUT.name)


def unpack(weight: QuantizedWeight) -> QuantizedWeight:
    """The inverse of `pack`."""
    rows, columns = weight.out_features + -weight.out_features % PANEL, weight.in_features + -weight.in_features % STEP
    tiles = weight.values[: rows * columns].view(-1, columns // 4, PANEL, 4)
    values = tiles.transpose(1, 2).reshape(rows, columns)[: weight.out_features, : weight.in_features].contiguous()
    return replace(weight, values=values, scales=weight.scales[: weight.out_features].clone(), layout=PLAIN)


LAYOUT = Layout("native_int8", 8, pack, unpack, pack_reasons)
LAYOUTS = (LAYOUT,)
_NATIVE = library()


def forward(c: Call) -> Tensor:
    x = rows_of(c.x)
    out = result(x, outputs(c.out_features, c.activation), c.out_dtype)
    bias, smooth_scale = c.bias, c.smooth_scale
    if bias is not None:
        bias = vector(bias)
    if smooth_scale is not None:
        smooth_scale = vector(smooth_scale)
    _NATIVE.int8_linear(x, out, c.scales, bias, ACTIVATION_NUMBERS[c.activation], c.values, smooth_scale)  # type: ignore[union-attr]
    return out


def limits(which: str, c: Call) -> list[str]:
    found = []
    if c.layout != LAYOUT.name:
        found.append(f"the weight is in the layout {c.layout!r}, not {LAYOUT.name!r}: pack it with weight.pack()")
    if c.out_dtype not in OUTPUT_TYPES:
        found.append(f"out_dtype is {c.out_dtype}, not one of {', '.join(map(str, OUTPUT_TYPES))}")
    return found


BACKENDS = (Backend("int8_linear", "native", forward, dtypes=INPUT_TYPES, devices=("cpu",), limits=limits, unavailable=reason),)
