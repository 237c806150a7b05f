"""What the quantised linears on the CUDA library share: kernels for a few rows of x that stream the weight once, in the Triton kernels' layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import cuda
from cvmk.ops.cuda import TYPES
from cvmk.ops.int8_linear import STATIC
from cvmk.ops.quantize import PLAIN
from cvmk.ops.triton.int8_linear import ALIGNED

MOST_ROWS = 8
MOST_SHARED = 160 * 1024
"""Bytes of shared memory that a block may ask for on every device from compute capability 8.0 on but the small ones (8.6, 8.9: 99 KiB)."""


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, at an address that 16 divides."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def vector(tensor: Tensor | None) -> Tensor | None:
    """An optional vector as the kernels read it."""
    return None if tensor is None else (tensor if tensor.dtype in TYPES else tensor.float()).contiguous()


def aligned_rows(x: Tensor) -> Tensor:
    """x [M, K], K a multiple of 16, with contiguous rows, each at an address that 16 divides."""
    good = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if good else x.clone(memory_format=torch.contiguous_format)


def limits(layouts: tuple[str, ...], shared: str) -> Callable[[str, Any], list[str]]:
    """For `Backend.limits`: weights in one of the layouts; `shared` is the library's function for the bytes of shared memory."""

    def found(which: str, c: Any) -> list[str]:
        rows, inputs = c.x.shape
        out_dtype = getattr(c, "out_dtype", torch.float32)
        reasons = [STATIC] if getattr(c, "input_range", None) is not None else []
        if c.layout not in layouts:
            reasons.append(f"the weight is in the layout {c.layout!r}, not {' or '.join(map(repr, layouts))}: pack it with weight.pack()")
        if rows > MOST_ROWS:
            reasons.append(f"x has {rows} rows, more than {MOST_ROWS}")
        if c.layout == PLAIN and inputs % ALIGNED:
            reasons.append(f"x has {inputs} inputs, no multiple of {ALIGNED}: pack the weight with weight.pack()")
        if out_dtype not in TYPES:
            reasons.append(f"out_dtype is {out_dtype}, not one of {', '.join(map(str, TYPES))}")
        library = cuda.library()
        if not reasons and library is not None and getattr(library, shared)(rows, inputs) > MOST_SHARED:
            reasons.append(f"{rows} rows of {inputs} inputs do not fit into {MOST_SHARED // 1024} KiB of shared memory")
        return reasons

    return found
