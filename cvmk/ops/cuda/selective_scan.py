"""Selective scan and its single step by the CUDA kernels in csrc/scan/cuda_scan_*.cu.

A warp has a channel and scans it along time, so that neighbouring lanes read neighbouring steps; inputs whose time is not contiguous are
copied first. Gradients that are sums over channels or over the batch are added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops import cuda
from cvmk.ops._backend import Backend
from cvmk.ops.native.selective_scan import DTYPES, as_inputs, gradients_of, readable_grads, readable_scan, readable_update, results_of, update_limits
from cvmk.ops.selective_scan import ScanCall, ScanOut, UpdateCall, sizes_of, turning

MOST_STATES = 256
"""States of a channel; a block of the backward pass keeps four numbers a state and warp in shared memory."""


def _along_time(tensor: Tensor) -> Tensor:
    """With a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _readable(c: ScanCall) -> ScanCall:
    return readable_scan(
        c._replace(u=_along_time(c.u), delta=_along_time(c.delta), B=_along_time(c.B), C=_along_time(c.C), z=None if c.z is None else _along_time(c.z))
    )


def scan_forward(c: ScanCall) -> ScanOut:
    found = results_of(c)
    _library().scan_forward(cuda.stream(c.u), *_readable(c), *found)
    return found


def scan_backward(g: ScanOut, c: ScanCall, saved: ScanOut, needs: Any) -> tuple[Tensor | None, ...]:
    grads = gradients_of(c, needs)
    grad_out, grad_last = readable_grads(g)
    grad_out = None if grad_out is None else _along_time(grad_out)
    arguments = (cuda.stream(c.u), *_readable(c), grad_out, grad_last, saved.states.contiguous(), *grads)
    workspace = torch.empty(max(1, _library().scan_backward(*arguments, None)), dtype=torch.float32, device=c.u.device)
    _library().scan_backward(*arguments, workspace)
    return as_inputs(c, grads)


def update_forward(c: UpdateCall) -> Tensor:
    y = torch.empty(c.x.shape, dtype=c.x.dtype, device=c.x.device)
    _library().scan_state_update(cuda.stream(c.x), *readable_update(c), y)
    return y


def _library() -> Any:
    found = cuda.library()
    assert found is not None
    return found


def _scan_limits(which: str, c: ScanCall) -> list[str]:
    states, length = c.A.shape[1], sizes_of(c)[2]
    found = [f"A has {states} states, more than {MOST_STATES}"] if states > MOST_STATES else []
    return [*found, f"u has {length} steps, more than 2^30"] if length > 2**30 else found


_OPTIONS: dict[str, Any] = {"dtypes": DTYPES, "devices": ("cuda",), "unavailable": cuda.reason}
BACKENDS = (
    Backend(
        "selective_scan", "cuda", *turning(scan_forward, scan_backward), limits=_scan_limits, by_default=cuda.by_default("selective_scan", "u"), **_OPTIONS
    ),
    Backend(
        "selective_state_update", "cuda", update_forward, limits=update_limits, by_default=cuda.by_default("selective_state_update", "x"), **_OPTIONS
    ),
)
