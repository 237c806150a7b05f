"""`int4_linear` on the CPU library: one packed layout for one row and for a thousand."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from cvmk.ops._backend import Backend
from cvmk.ops.int4_linear import Call
from cvmk.ops.native import library
from cvmk.ops.native._linear import INPUT_TYPES, PANEL, pack_reasons, panels, reason, result, rows_of, vector
from cvmk.ops.quantize import ACTIVATION_NUMBERS, PLAIN, Layout, QuantizedWeight, outputs, pack_int4, unpack_int4

BLOCK = 128
"""Inputs that stand together."""


def pack(weight: QuantizedWeight) -> QuantizedWeight:
    """A canonical weight in the layout "native_int4" (`_linear` describes it)."""
    codes = panels(F.pad(unpack_int4(weight.values), (0, -weight.in_features % BLOCK)))
    nibbles = codes.view(-1, PANEL, codes.shape[2] // BLOCK, 4, BLOCK // 4).permute(0, 2, 1, 4, 3)  # panel, block, output, word, nibble
    values = pack_int4(nibbles.reshape(-1, 4)).flatten()  # the even nibble of a byte is the low one
    scales, zeros = (None if tensor is None else panels(tensor).transpose(1, 2).contiguous() for tensor in (weight.scales, weight.zeros))
    assert scales is not None
    order = None if weight.order is None else weight.order.contiguous()
    return replace(weight, values=values, scales=scales, zeros=zeros, order=order, layout=LAYOUT.name)


def unpack(weight: QuantizedWeight) -> QuantizedWeight:
    """The inverse of `pack`."""
    rows, columns = weight.out_features, weight.in_features
    blocks = (columns + BLOCK - 1) // BLOCK
    nibbles = unpack_int4(weight.values.view(-1, 2)).view(-1, blocks, PANEL, BLOCK // 4, 4)
    values = nibbles.permute(0, 2, 1, 4, 3).reshape(-1, blocks * BLOCK)[:rows, :columns]
    scales, zeros = (None if t is None else t.transpose(1, 2).reshape(-1, t.shape[1])[:rows].contiguous() for t in (weight.scales, weight.zeros))
    assert scales is not None
    return replace(weight, values=pack_int4(values), scales=scales, zeros=zeros, layout=PLAIN)


LAYOUT = Layout("native_int4", 4, pack, unpack, pack_reasons)
LAYOUTS = (LAYOUT,)
_NATIVE = library()


def forward(c: Call) -> Tensor:
    x = rows_of(c.x)
    out = result(x, outputs(c.out_features, c.activation), x.dtype)
    bias = c.bias
    if bias is not None:
        bias = vector(bias)
    _NATIVE.int4_linear(x, out, c.scales, bias, ACTIVATION_NUMBERS[c.activation], c.values, c.zeros, c.order, c.group_size)  # type: ignore[union-attr]
    return out


def limits(which: str, c: Call) -> list[str]:
    return [] if c.layout == LAYOUT.name else [f"the weight is in the layout {c.layout!r}, not {LAYOUT.name!r}: pack it with weight.pack()"]


BACKENDS = (Backend("int4_linear", "native", forward, dtypes=INPUT_TYPES, devices=("cpu",), limits=limits, unavailable=reason),)
