"""What the quantised linears on the CUDA library share: kernels for a few rows of x that stream the weight once, in the Triton kernels' layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import cuda
from cvmk.ops.cuda import TYPES
from cvmk.ops.native._linear import ACTIVATIONS
from cvmk.ops.quantize import PLAIN
from cvmk.ops.triton.int8_linear import ALIGNED

MOST_ROWS = 8
MOST_SHARED = 160 * 1024
"""Bytes of shared memory that a block may ask for on every device from compute capability 8.0 on but the small ones (8.6, 8.9: 99 KiB)."""


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, at an address that 16 divides."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def vector(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """An optional vector as the kernels read it, with its address and type."""
    if tensor is None:
        return None, 0, 0
    tensor = (tensor if tensor.dtype in TYPES else tensor.float()).contiguous()
    return tensor, tensor.data_ptr(), TYPES[tensor.dtype]


def aligned_rows(x: Tensor) -> Tensor:
    """x [M, K], K a multiple of 16, with contiguous rows, each at an address that 16 divides."""
    good = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if good else x.clone(memory_format=torch.contiguous_format)


def numbers(x: Tensor, out: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, activation: str | None) -> tuple[int, ...]:
    """The integers that both kernels begin with; x, scales and bias as `aligned_rows`, `contiguous` and `vector` leave them."""
    _, bias_address, bias_type = vector(bias)
    return (
        *cuda.place(x),
        *(x.data_ptr(), TYPES[x.dtype], x.stride(0), *x.shape, out_features),
        *(out.data_ptr(), TYPES[out.dtype], scales.data_ptr(), bias_address, bias_type, ACTIVATIONS[activation]),
    )


def limits(layouts: tuple[str, ...], shared: str) -> Callable[[str, Mapping[str, Any]], list[str]]:
    """For `Backend.limits`: weights in one of the layouts; `shared` is the library's function for the bytes of shared memory."""

    def found(which: str, named: Mapping[str, Any]) -> list[str]:
        rows, inputs = named["x"].shape
        reasons = []
        if named["layout"] not in layouts:
            reasons.append(f"the weight is in the layout {named['layout']!r}, not {' or '.join(map(repr, layouts))}: pack it with weight.pack()")
        if rows > MOST_ROWS:
            reasons.append(f"x has {rows} rows, more than {MOST_ROWS}")
        if named["layout"] == PLAIN and inputs % ALIGNED:
            reasons.append(f"x has {inputs} inputs, no multiple of {ALIGNED}: pack the weight with weight.pack()")
        if named.get("out_dtype", torch.float32) not in TYPES:
            reasons.append(f"out_dtype is {named['out_dtype']}, not one of {', '.join(map(str, TYPES))}")
        library = cuda.library()
        if not reasons and library is not None and getattr(library, shared)(rows, inputs) > MOST_SHARED:
            reasons.append(f"{rows} rows of {inputs} inputs do not fit into {MOST_SHARED // 1024} KiB of shared memory")
        return reasons

    return found
