"""`int8_linear` on the CPU library: rows quantised, multiplied, scaled and finished in one call; the layout of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.ops._dispatch import Backend
from cvmk.ops.native._linear import ACTIVATIONS, INPUT_TYPES, PANEL, TYPES, linears, pack_reasons, panels, reason, rows_of, vector
from cvmk.ops.quantize import PLAIN, Layout, QuantizedWeight, outputs

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


def forward(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    smooth_scale: Tensor | None,
    layout: str,
    out_features: int,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    x = rows_of(x)
    rows, inputs = x.shape
    columns = outputs(out_features, activation)
    out = x.new_empty((rows, columns)) if out_dtype == x.dtype else x.new_empty((rows, columns), dtype=out_dtype)
    bias_address = bias_type = smooth_address = smooth_type = 0
    if bias is not None:
        bias, bias_address, bias_type = vector(bias)
    if smooth_scale is not None:
        smooth_scale, smooth_address, smooth_type = vector(smooth_scale)
    linears().int8_linear(
        x.data_ptr(),
        TYPES[x.dtype],
        x.stride(0),
        rows,
        inputs,
        out_features,
        out.data_ptr(),
        TYPES[out_dtype],
        scales.data_ptr(),
        bias_address,
        bias_type,
        ACTIVATIONS[activation],
        values.data_ptr(),
        smooth_address,
        smooth_type,
    )
    return out


def limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    found = []
    if arguments["layout"] != LAYOUT.name:
        found.append(f"the weight is in the layout {arguments['layout']!r}, not {LAYOUT.name!r}: pack it with weight.pack()")
    if arguments["out_dtype"] not in TYPES:
        found.append(f"out_dtype is {arguments['out_dtype']}, not one of {', '.join(map(str, TYPES))}")
    return found


BACKENDS = (Backend("int8_linear", "native", forward, dtypes=INPUT_TYPES, devices=("cpu",), limits=limits, unavailable=reason),)
