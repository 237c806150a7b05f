"""`int4_linear` in Triton, on weights in the layout "triton_int4":

values  uint8 [N, ceil(K / 128), 64]: byte j of a block of 128 inputs holds input j in its low and input 64 + j in its high nibble, 0 behind K
scales  float32 [K / g, N]; zeros uint8 [K / g, N] or None; order int32 [K] or None

Up to FEW rows share one pass over the weight, cut along its inputs too, and the sums of the pieces are added by a second launch in a
fixed order; above, one launch. The activation order is undone on x, by one launch more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.ops import triton
from cvmk.ops._backend import Backend
from cvmk.ops.int4_linear import Call
from cvmk.ops.quantize import PLAIN, Layout, QuantizedWeight, outputs, pack_int4, unpack_int4
from cvmk.ops.triton import _launch
from cvmk.ops.triton._tuning import Config, Tuned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = 16
"""Most rows that share one pass over the weight."""
BLOCK = 128
"""Inputs that stand together."""


def pack(weight: QuantizedWeight) -> QuantizedWeight:
    """A canonical weight in the layout "triton_int4"."""
    rows = weight.out_features
    codes = F.pad(unpack_int4(weight.values), (0, -weight.in_features % BLOCK)).view(rows, -1, 2, BLOCK // 2)
    values = codes[:, :, 0] | (codes[:, :, 1] << 4)
    scales, zeros = (None if tensor is None else tensor.t().contiguous() for tensor in (weight.scales, weight.zeros))
    assert scales is not None
    return replace(weight, values=values.contiguous(), scales=scales, zeros=zeros, layout=LAYOUT.name)


def unpack(weight: QuantizedWeight) -> QuantizedWeight:
    """The inverse of `pack`."""
    codes = torch.stack((weight.values & 15, weight.values >> 4), dim=2).view(weight.out_features, -1)[:, : weight.in_features]
    scales, zeros = (None if tensor is None else tensor.t().contiguous() for tensor in (weight.scales, weight.zeros))
    assert scales is not None
    return replace(weight, values=pack_int4(codes), scales=scales, zeros=zeros, layout=PLAIN)


def pack_reasons(weight: QuantizedWeight) -> list[str]:
    return [] if weight.device.type == "cuda" else [f"the weight is on {weight.device}"]


LAYOUT = Layout("triton_int4", 4, pack, unpack, pack_reasons)
LAYOUTS = (LAYOUT,)


def _heuristic(key: str, capability: tuple[int, int]) -> Config:
    if key.startswith("few"):
        return {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    if key.startswith("some") or "float32" in key:  # three products in tf32 for one in float32 need thrice the registers
        return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}


def _candidates(key: str, capability: tuple[int, int]) -> list[Config]:
    if key.startswith("few"):
        return [{"BLOCK_N": n, "num_warps": warps, "num_stages": stages} for n in (32, 64, 128) for warps in (2, 4) for stages in (2, 3, 4)]
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
        for m, n, warps in ((32, 64, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 4), (128, 128, 8), (256, 64, 8))
        for stages in (2, 3, 4)
    ]


PRODUCT = Tuned("int4_linear", _heuristic, _candidates)
TUNED = (PRODUCT,)


def _splits(blocks: int, programs: int, device: torch.device) -> int:
    """Into how many pieces the blocks of 128 inputs are cut, so that four programs a multiprocessor read the weight."""
    return max(1, min(blocks, -(-4 * _launch.multiprocessors(device) // programs)))


def forward(c: Call) -> Tensor:
    x, (rows, inputs) = c.x, c.x.shape
    columns = outputs(c.out_features, c.activation)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if c.order is not None:
        x = x.index_select(1, c.order)
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = c.bias if c.bias is None else c.bias.to(x.dtype).contiguous()
    many = "few" if rows <= FEW else "some" if rows <= 64 else "many"
    config = dict(PRODUCT.config(f"{many} {str(x.dtype).removeprefix('torch.')}", x.device))
    kernels = _launch.kernels("int4_linear")
    options: dict[str, Any] = {"GROUP_SIZE": c.group_size, "PRECISION": _launch.float32_precision(), **config}
    if rows > FEW:
        tiles = -(-rows // config["BLOCK_M"]) * -(-columns // config["BLOCK_N"])
        numbers = (rows, c.out_features, inputs, x.stride(0))
        _launch.launch(kernels.product, (tiles,), x, c.values, c.scales, c.zeros, bias, out, *numbers, ACTIVATION=c.activation, GROUP=8, **options)
        return out
    blocks, programs = c.values.shape[1], -(-c.out_features // config["BLOCK_N"])
    share = -(-blocks // _splits(blocks, programs, x.device))
    splits = -(-blocks // share)
    partial = torch.empty((splits, rows, c.out_features), dtype=torch.float32, device=x.device)
    _launch.launch(
        kernels.split_product,
        (programs if rows else 0, splits),
        *(x, c.values, c.scales, c.zeros, partial, rows, c.out_features, inputs, x.stride(0), share),
        BLOCK_M=FEW,
        **options,
    )
    _launch.launch(kernels.add_splits, (rows, -(-columns // 256)), partial, bias, out, rows, c.out_features, splits, ACTIVATION=c.activation, BLOCK_N=256)
    return out


def limits(which: str, c: Call) -> list[str]:
    return [] if c.layout == LAYOUT.name else [f"the weight is in the layout {c.layout!r}, not {LAYOUT.name!r}: pack it with weight.pack()"]


BACKENDS = (
    Backend(
        "int4_linear", "triton", forward, dtypes=DTYPES, devices=triton.DEVICES, limits=limits, unavailable=triton.reason, by_default=triton.by_default
    ),
)


# -- calls that are compiled and timed ---------------------------------------------------------------------------------------------
def _case(rows: int, activation: str | None, dtype: torch.dtype, group_size: int = 128, zeros: bool = False) -> _launch.Case:
    def run(device: torch.device) -> None:
        inputs, features = 4096, 8192 if activation == "swiglu" else 4096
        values = _launch.sample((features, inputs // BLOCK, BLOCK // 2), torch.float32, device, 40.0).clamp(0, 255).to(torch.uint8)
        scales, bias = _launch.sample((inputs // group_size, features), torch.float32, device).abs(), _launch.sample((features,), dtype, device)
        points = torch.full((inputs // group_size, features), 7, dtype=torch.uint8, device=device) if zeros else None
        x = _launch.sample((rows, inputs), dtype, device)
        forward(Call(x, values, scales, points, None, bias, LAYOUT.name, features, group_size, activation))

    return _launch.Case(f"{str(dtype).removeprefix('torch.')} M{rows} g{group_size}{' zeros' if zeros else ''} {activation or ''}", run)


CASES = (
    *(_case(rows, None, torch.bfloat16) for rows in (1, 64, 4096)),
    _case(16, "swiglu", torch.bfloat16, 32, zeros=True),
    _case(4096, "swiglu", torch.bfloat16, 64, zeros=True),
    _case(64, "swiglu", torch.bfloat16, 128),
    _case(4096, "gelu", torch.float16),
    _case(1, None, torch.float32),
    _case(4096, None, torch.float32),
)
