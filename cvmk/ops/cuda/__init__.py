"""Backends that run on the CUDA library `cvmk._native_cuda`, one file an op, and whether that library and a device are there.

Kernels are queued on PyTorch's current stream of the tensors' device; nothing waits for the device, so that calls can be captured in
CUDA graphs. A kernel takes calls by itself only on classes of devices where it was measured and beat the other backends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from cvmk.libraries import load

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of elements that the kernels read."""
OLDEST = (8, 0)
"""The oldest compute capability that the library is built for."""
MEASURED: dict[str, frozenset[tuple[int, int]]] = {}
"""By op: the compute capabilities of the devices on which its kernel was measured and is the fastest (benchmarks/results)."""


def library() -> ModuleType | None:
    """The module `cvmk._native_cuda`, or None where it was not built or does not load (`reason` says why)."""
    return load("_native_cuda", "cuda")[0]


@functools.cache
def reason() -> str | None:
    """Why the kernels cannot run in this process (a sentence without its full stop), or None."""
    found, why = load("_native_cuda", "cuda")
    if found is None:
        return why
    problem: str = found.device_error()
    if problem:
        return problem
    if not torch.cuda.is_available():
        return "PyTorch was built without CUDA, or sees no device"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need {OLDEST[0]}.{OLDEST[1]}"
    return None


def by_default(op: str, principal: str) -> Callable[[str, Any], str | None]:
    """For `Backend.by_default`: calls come by themselves only to devices on which the op's kernel was measured."""

    def asked(which: str, call: Any) -> str | None:
        device = getattr(call, principal).device
        measured = device.type == "cuda" and torch.cuda.get_device_capability(device) in MEASURED.get(op, ())
        return None if measured else "not yet measured on this device class"

    return asked


def place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a call runs: the tensor's device and the address of PyTorch's current stream there."""
    stream = torch.cuda.current_stream(tensor.device)
    return stream.device_index, stream.cuda_stream


def stream(tensor: torch.Tensor) -> int:
    """The address of PyTorch's current stream on the tensor's device."""
    return place(tensor)[1]
