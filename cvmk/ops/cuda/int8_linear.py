"""`int8_linear` for up to 8 rows by the CUDA kernel in csrc/gemm/cuda_int8_rows.cu: one launch, the weight is read once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.ops import cuda
from cvmk.ops._backend import Backend
from cvmk.ops.cuda._linear import aligned, aligned_rows, limits, vector
from cvmk.ops.int8_linear import Call
from cvmk.ops.quantize import ACTIVATION_NUMBERS, PLAIN, outputs
from cvmk.ops.triton.int8_linear import LAYOUT


def forward(c: Call) -> Tensor:
    x, smooth_scale = c.x, c.smooth_scale
    out = torch.empty((x.shape[0], outputs(c.out_features, c.activation)), dtype=c.out_dtype, device=x.device)
    missing = c.values.shape[1] - x.shape[1]
    if missing:
        x = F.pad(x, (0, missing))
        smooth_scale = None if smooth_scale is None else F.pad(smooth_scale, (0, missing), value=1.0)
    library = cuda.library()
    assert library is not None
    activation = ACTIVATION_NUMBERS[c.activation]
    library.int8_linear(cuda.stream(x), aligned_rows(x), out, c.scales.contiguous(), vector(c.bias), activation, aligned(c.values), vector(smooth_scale))
    return out


LAYOUTS = (LAYOUT,)
BACKENDS = (
    Backend(
        "int8_linear",
        "cuda",
        forward,
        dtypes=cuda.TYPES,
        devices=("cuda",),
        limits=limits((PLAIN, LAYOUT.name), "int8_shared"),
        unavailable=cuda.reason,
        by_default=cuda.by_default("int8_linear", "x"),
    ),
)
