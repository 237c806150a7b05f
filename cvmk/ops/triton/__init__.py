"""Backends written in Triton, one file an op, and whether Triton can run here.

Files of this folder say what a backend takes, allocate and launch; the kernels stand in `kernels/` and are imported at the first
launch, so that a process without a GPU never imports Triton. With TRITON_INTERPRET=1 set before Triton is first imported, the kernels
run on CPU tensors under Triton's interpreter: slow, for tests, and chosen only by `ops.use("triton")`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)
OLDEST = (8, 0)
"""The oldest compute capability that the kernels are compiled for."""
MEASURED: dict[str, frozenset[tuple[int, int]]] = {}
"""By op: the compute capabilities of the devices on which its kernels were measured (benchmarks/results); elsewhere their first use warns."""


@functools.cache
def reason() -> str | None:
    """Why Triton cannot run in this process (a sentence without its full stop), or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device that PyTorch can use"
    if torch.version.hip is not None:
        return "the kernels are written and checked for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need {OLDEST[0]}.{OLDEST[1]}"
    return None


def by_default(which: str, call: Any) -> str | None:
    """Why a call does not come here by itself: its tensors are on the CPU, where kernels are interpreted."""
    if any(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in call):
        return "kernels on the CPU are interpreted, which is for tests"
    return None
