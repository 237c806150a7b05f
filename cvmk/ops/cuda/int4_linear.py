"""`int4_linear` for up to 8 rows by the CUDA kernel in csrc/gemm/cuda_int4_rows.cu: one launch, the weight is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk.ops import cuda
from cvmk.ops._backend import Backend
from cvmk.ops.cuda._linear import aligned, aligned_rows, limits, vector
from cvmk.ops.int4_linear import Call
from cvmk.ops.quantize import ACTIVATION_NUMBERS, outputs
from cvmk.ops.triton.int4_linear import LAYOUT


def forward(c: Call) -> Tensor:
    x = c.x
    out = torch.empty((x.shape[0], outputs(c.out_features, c.activation)), dtype=x.dtype, device=x.device)
    zeros, order = (None if tensor is None else tensor.contiguous() for tensor in (c.zeros, c.order))
    library = cuda.library()
    assert library is not None
    activation, scales = ACTIVATION_NUMBERS[c.activation], c.scales.contiguous()
    library.int4_linear(cuda.stream(x), aligned_rows(x), out, scales, vector(c.bias), activation, aligned(c.values), zeros, order, c.group_size)
    return out


LAYOUTS = (LAYOUT,)
BACKENDS = (
    Backend(
        "int4_linear",
        "cuda",
        forward,
        dtypes=cuda.TYPES,
        devices=("cuda",),
        limits=limits((LAYOUT.name,), "int4_shared"),
        unavailable=cuda.reason,
        by_default=cuda.by_default("int4_linear", "x"),
    ),
)
