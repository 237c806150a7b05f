"""`int8_linear` for up to 8 rows by the CUDA kernel in csrc/gemm/cuda_int8_rows.cu: one launch, the weight is read once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.ops import cuda
from cvmk.ops._dispatch import Backend
from cvmk.ops.cuda._linear import aligned, aligned_rows, limits, numbers, vector
from cvmk.ops.quantize import PLAIN, outputs
from cvmk.ops.triton.int8_linear import LAYOUT


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
    out = torch.empty((x.shape[0], outputs(out_features, activation)), dtype=out_dtype, device=x.device)
    missing = values.shape[1] - x.shape[1]
    if missing:
        x = F.pad(x, (0, missing))
        smooth_scale = None if smooth_scale is None else F.pad(smooth_scale, (0, missing), value=1.0)
    x, values, scales = aligned_rows(x), aligned(values), scales.contiguous()
    bias, _, _ = vector(bias)
    smooth_scale, smooth_address, smooth_type = vector(smooth_scale)
    library = cuda.library()
    assert library is not None
    library.int8_linear((*numbers(x, out, scales, bias, out_features, activation), values.data_ptr(), smooth_address, smooth_type))
    return out


LAYOUTS = (LAYOUT,)
BACKENDS = (
    Backend(
        "int8_linear",
        "cuda",
        forward,
        dtypes=tuple(cuda.TYPES),
        devices=("cuda",),
        limits=limits((PLAIN, LAYOUT.name), "int8_shared"),
        unavailable=cuda.reason,
        by_default=cuda.by_default("int8_linear", "x"),
    ),
)
