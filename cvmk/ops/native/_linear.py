"""What the quantised linears on the CPU library share: types, activations, and how weights are packed for them.

The layouts, for N outputs and K inputs, in panels of 16 outputs (P = N / 16 rounded up, the last one filled with zeros):

"native_int8"  values  int8: [P][steps of 64 inputs][16 quads][16 outputs][4 inputs], inputs filled up with zeros; then, as bytes, int32
                       [16 P]: -128 times the sum of every row of the weight. A step is an AMX tile, a quad an operand of vpdpbusd.
               scales  float32 [16 P + 16]
"native_int4"  values  uint8, little-endian words of 16 bits [P][blocks of 128 inputs][16 outputs][32]: nibble j of word i is input 32 j + i
                       of the block, inputs filled up with zeros. A table of an output's sixteen values turns words into a tile's row.
               scales  float32 [P, G, 16]; zeros uint8 [P, G, 16] or None; order int32 [K] or None
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk.ops import native
from cvmk.ops._storage import with_memory
from cvmk.ops.native._memory import LARGE, empty
from cvmk.ops.quantize import QuantizedWeight

INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUT_TYPES = (*INPUT_TYPES, torch.float64)
PANEL = 16


def rows_of(x: Tensor) -> Tensor:
    """x with contiguous inputs."""
    return x if x.is_contiguous() or x.stride(1) == 1 or x.shape[1] == 1 else with_memory(x).contiguous()


def result(x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for the result [M, columns]."""
    rows = x.shape[0]
    if rows * columns >= LARGE // 8:  # an element has eight bytes at most
        return empty((rows, columns), dtype)
    return x.new_empty(rows, columns) if x.dtype == dtype else x.new_empty(rows, columns, dtype=dtype)


def vector(tensor: Tensor) -> Tensor:
    """A vector as the kernels read it."""
    if tensor.dtype not in INPUT_TYPES:
        tensor = with_memory(tensor).float()
    return tensor if tensor.is_contiguous() else with_memory(tensor).contiguous()


def reason() -> str | None:
    """Why the linears of the CPU library cannot run in this process, or None."""
    library = native.library()
    if library is None:
        return native.reason()
    return None if hasattr(library, "pack_int8") else "cvmk._native is an older build without the linears: install the package again"


def pack_reasons(weight: QuantizedWeight) -> list[str]:
    """Why a weight is not packed for the CPU library; empty where it can be."""
    missing = reason()
    if missing is not None:
        return [missing]
    return [] if weight.device.type == "cpu" else [f"the weight is on {weight.device}"]
