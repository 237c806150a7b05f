"""`int4_linear` for up to 8 rows by the CUDA kernel in csrc/gemm/cuda_int4_rows.cu: one launch, the weight is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk.ops import cuda
from cvmk.ops._dispatch import Backend
from cvmk.ops.cuda import address
from cvmk.ops.cuda._linear import aligned, aligned_rows, limits, numbers, vector
from cvmk.ops.quantize import outputs
from cvmk.ops.triton.int4_linear import LAYOUT


def forward(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    layout: str,
    out_features: int,
    group_size: int,
    activation: str | None,
) -> Tensor:
    out = torch.empty((x.shape[0], outputs(out_features, activation)), dtype=x.dtype, device=x.device)
    x, values, scales = aligned_rows(x), aligned(values), scales.contiguous()
    zeros, order = (None if tensor is None else tensor.contiguous() for tensor in (zeros, order))
    bias, _, _ = vector(bias)
    library = cuda.library()
    assert library is not None
    library.int4_linear((*numbers(x, out, scales, bias, out_features, activation), values.data_ptr(), address(zeros), address(order), group_size))
    return out


LAYOUTS = (LAYOUT,)
BACKENDS = (
    Backend(
        "int4_linear",
        "cuda",
        forward,
        dtypes=tuple(cuda.TYPES),
        devices=("cuda",),
        limits=limits((LAYOUT.name,), "int4_shared"),
        unavailable=cuda.reason,
        by_default=cuda.by_default("int4_linear", "x"),
    ),
)
