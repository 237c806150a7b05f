"""What the hardware allows: the fastest possible times that the share of the limit in a row refers to.

The rates are those measured on the machine of the committed results (2 cores with AVX-512 and AMX); another machine sets
CVMK_LIMIT_GBS, CVMK_LIMIT_TFLOPS_BF16, CVMK_LIMIT_TFLOPS_FP32 and CVMK_LIMIT_TOPS_INT8.
"""

from __future__ import annotations

import os

import torch

MEMORY = float(os.environ.get("CVMK_LIMIT_GBS", 30)) * 1e9
BF16 = float(os.environ.get("CVMK_LIMIT_TFLOPS_BF16", 3.75)) * 1e12  # a core
FP32 = float(os.environ.get("CVMK_LIMIT_TFLOPS_FP32", 0.19)) * 1e12  # a core
INT8 = float(os.environ.get("CVMK_LIMIT_TOPS_INT8", 7.5)) * 1e12  # a core


def rates() -> dict[str, float]:
    """Those that limits were computed by."""
    return {"GB/s": MEMORY / 1e9, "TFLOPS bfloat16": BF16 / 1e12, "TFLOPS float32": FP32 / 1e12, "TOPS int8": INT8 / 1e12}


def cpu_limit(*, operations: float = 0.0, dtype: torch.dtype = torch.float32, traffic: float = 0.0) -> float:
    """Seconds that `operations` in `dtype` on all threads, or `traffic` bytes of memory, take at least."""
    rate = {torch.bfloat16: BF16, torch.int8: INT8}.get(dtype, FP32) * torch.get_num_threads()
    return max(operations / rate, traffic / MEMORY)
