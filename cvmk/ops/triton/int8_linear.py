"""`int8_linear` in Triton, on weights in the canonical layout: rows of K neighbouring bytes are what the tensor cores' loads want.
Where K is no multiple of 16 the layout "triton_int8" fills the rows up with zeros, so that each begins at a multiple of 16 bytes.

Up to FEW rows one launch quantises and multiplies; above, the rows are quantised by a launch of their own. Bits do not depend on which.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.ops import triton
from cvmk.ops._backend import Backend
from cvmk.ops.int8_linear import STATIC, Call
from cvmk.ops.quantize import PLAIN, Layout, QuantizedWeight, outputs
from cvmk.ops.triton import _launch
from cvmk.ops.triton._tuning import Config, Tuned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = 64
"""Most rows that every program quantises for itself."""
ALIGNED = 16
"""Bytes that a thread loads at once."""


def pack(weight: QuantizedWeight) -> QuantizedWeight:
    """A canonical weight with rows of a multiple of 16 bytes."""
    return replace(weight, values=F.pad(weight.values, (0, -weight.in_features % ALIGNED)), layout=LAYOUT.name)


def unpack(weight: QuantizedWeight) -> QuantizedWeight:
    """The inverse of `pack`."""
    return replace(weight, values=weight.values[:, : weight.in_features].contiguous(), layout=PLAIN)


def pack_reasons(weight: QuantizedWeight) -> list[str]:
    if weight.device.type != "cuda":
        return [f"the weight is on {weight.device}"]
    return [] if weight.in_features % ALIGNED else ["its rows are aligned as they are"]


LAYOUT = Layout("triton_int8", 8, pack, unpack, pack_reasons)
LAYOUTS = (LAYOUT,)


def _heuristic(key: str, capability: tuple[int, int]) -> Config:
    if key.startswith("few"):
        rows = int(key.removeprefix("few"))
        return {"BLOCK_M": rows, "BLOCK_N": 32, "BLOCK_K": 256 if rows < 64 else 128, "num_warps": 4, "num_stages": 4 if rows < 64 else 3}
    wide = 64 if key.endswith("swiglu") else 128
    return {"BLOCK_M": 128, "BLOCK_N": wide, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}


def _candidates(key: str, capability: tuple[int, int]) -> list[Config]:
    if key.startswith("few"):
        rows = int(key.removeprefix("few"))
        shapes = [(n, k, warps, stages) for n in (16, 32, 64) for k in (128, 256) for warps in (2, 4) for stages in (3, 5)]
    else:
        rows, shapes = 0, [(64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 4), (256, 64, 8, 4), (256, 128, 8, 3)]
    return [
        {"BLOCK_M": rows or blocks, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for blocks in ((rows,) if rows else (64, 128))
        for n, k, warps, stages in shapes
    ]


PRODUCT = Tuned("int8_linear", _heuristic, _candidates)
TUNED = (PRODUCT,)


def _key(rows: int, activation: str | None) -> str:
    if rows <= FEW:
        return f"few{16 if rows <= 16 else 32 if rows <= 32 else 64}"
    return "many swiglu" if activation == "swiglu" else "many"


def forward(c: Call) -> Tensor:
    x, (rows, inputs) = c.x, c.x.shape
    columns = outputs(c.out_features, c.activation)
    out = torch.empty((rows, columns), dtype=c.out_dtype, device=x.device)
    x = x if x.stride(1) == 1 or inputs == 1 else x.contiguous()
    bias, smooth_scale = (
        None if tensor is None else (tensor if tensor.dtype in DTYPES else tensor.float()).contiguous() for tensor in (c.bias, c.smooth_scale)
    )
    config = dict(PRODUCT.config(_key(rows, c.activation), x.device))
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages"), "enable_fp_fusion": False}
    kernels, maxima, few = _launch.kernels("int8_linear"), None, rows <= FEW
    smooth, stride = smooth_scale, x.stride(0)
    if not few:
        stride = -(-inputs // ALIGNED) * ALIGNED
        quantised, maxima = torch.empty((rows, stride), dtype=torch.int8, device=x.device), torch.empty(rows, dtype=torch.float32, device=x.device)
        block = min(4096, max(32, 1 << (inputs - 1).bit_length()))
        _launch.launch(
            kernels.quantise_rows,
            (rows,),
            *(x, smooth_scale, quantised, maxima, inputs, x.stride(0), stride),
            BLOCK_K=block,
            num_warps=max(1, min(8, block // 512)),
            enable_fp_fusion=False,
        )
        x, smooth = quantised, None
    _launch.launch(
        kernels.product,
        (-(-rows // config["BLOCK_M"]) * -(-columns // config["BLOCK_N"]),),
        *(x, smooth, maxima, c.values, c.scales, bias, out, rows, columns, inputs, stride, c.values.shape[1]),
        ACTIVATION=c.activation,
        QUANTISE=few,
        GROUP=8,
        **config,
        **options,
    )
    return out


def limits(which: str, c: Call) -> list[str]:
    found = []
    if c.input_range is not None:
        found.append(STATIC)
    if c.layout not in (PLAIN, LAYOUT.name):
        found.append(f"the weight is in the layout {c.layout!r}, not {PLAIN!r} or {LAYOUT.name!r}: pack it with weight.pack()")
    if c.out_dtype not in DTYPES:
        found.append(f"out_dtype is {c.out_dtype}, not one of {', '.join(map(str, DTYPES))}")
    return found


BACKENDS = (
    Backend(
        "int8_linear", "triton", forward, dtypes=DTYPES, devices=triton.DEVICES, limits=limits, unavailable=triton.reason, by_default=triton.by_default
    ),
)


# -- calls that are compiled and timed ---------------------------------------------------------------------------------------------
def _case(rows: int, activation: str | None, dtype: torch.dtype, smooth: bool = False, inputs: int = 4096) -> _launch.Case:
    def run(device: torch.device) -> None:
        features = 8192 if activation == "swiglu" else 4096
        values = _launch.sample((features, inputs), torch.float32, device, 40.0).clamp(-127, 127).to(torch.int8)
        weight = QuantizedWeight(values, torch.empty(0, device=device), None, None, features, inputs, 8, inputs)
        weight = pack(weight) if inputs % ALIGNED else weight
        scales, bias = _launch.sample((features,), torch.float32, device).abs(), _launch.sample((features,), dtype, device)
        smooth_scale = _launch.sample((inputs,), torch.float32, device).abs() if smooth else None
        x = _launch.sample((rows, inputs), dtype, device)
        forward(Call(x, weight.values, scales, bias, smooth_scale, None, weight.layout, features, activation, dtype))

    name = f"{str(dtype).removeprefix('torch.')} M{rows} K{inputs} {activation or ''}{' smooth' if smooth else ''}"
    return _launch.Case(name, run)


CASES = (
    *(_case(rows, None, torch.bfloat16) for rows in (16, 32, 64, 4096)),
    _case(16, "swiglu", torch.bfloat16, smooth=True),
    _case(4096, "swiglu", torch.bfloat16, smooth=True),
    _case(4096, "gelu", torch.float16),
    _case(4096, None, torch.float32),
    _case(64, "silu", torch.float32),
    _case(4096, None, torch.bfloat16, inputs=1000),
)
