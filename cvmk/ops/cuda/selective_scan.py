"""Selective scan and its single step by the CUDA kernels in csrc/scan/cuda_scan_*.cu.

A warp has a channel and scans it along time, so that neighbouring lanes read neighbouring steps; inputs whose time is not contiguous are
copied first. Gradients that are sums over channels or over the batch are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvmk.ops import cuda
from cvmk.ops._dispatch import Backend, not_needed
from cvmk.ops.native.selective_scan import _DTYPES, readable_scan
from cvmk.ops.selective_scan import SCAN_CHUNK, with_heads

MOST_STATES = 256
"""States of a channel; a block of the backward pass keeps four numbers a state and warp in shared memory."""
_FLOAT32 = torch.float32


def _along_time(tensor: Tensor | None) -> Tensor | None:
    """With a contiguous last dimension."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _call(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> tuple[Any, ...]:
    u, delta, B, C, z = (_along_time(tensor) for tensor in (u, delta, B, C, z))  # type: ignore[assignment]
    return readable_scan(u, delta, A, B, C, D, z, bias, initial, cu_seqlens, softplus, reverse)


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse)
    batch, dim, length = u.shape
    states = A.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = torch.empty((sequences, dim, states), dtype=_FLOAT32, device=u.device)
    kept = torch.empty((batch, -(-length // SCAN_CHUNK) * dim, states) if keep_states else (0,), dtype=_FLOAT32, device=u.device)
    library = cuda.library()
    assert library is not None
    library.scan_forward(cuda.stream(u), *call, out, last, kept if keep_states else None)
    return out, last, kept


def scan_backward(
    grad_out: Tensor | None,
    grad_last_state: Tensor | None,
    grad_states: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    reverse: bool,
    keep_states: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    call = _call(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse)
    if grad_out is not None:
        grad_out = _along_time(grad_out if grad_out.dtype in _DTYPES else grad_out.float())
    grad_last_state = None if grad_last_state is None else grad_last_state.to(_FLOAT32).contiguous()
    states = states.contiguous()
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    # Gradients of steps come in a dtype that the kernels write, the others in float32; float64 ones are widened at the end.
    stepwise = (True, True, False, B.dim() == 4, C.dim() == 4, False, True, False, False)
    grads = [
        torch.empty(tensor.shape, dtype=tensor.dtype if written and tensor.dtype in _DTYPES else _FLOAT32, device=u.device)
        if needed and tensor is not None
        else None
        for tensor, written, needed in zip(inputs, stepwise, needs, strict=False)
    ]
    library = cuda.library()
    assert library is not None
    arguments = (cuda.stream(u), *call, grad_out, grad_last_state, states, *grads)
    workspace = torch.empty(max(1, library.scan_backward(*arguments, None)), dtype=_FLOAT32, device=u.device)
    library.scan_backward(*arguments, workspace)
    return tuple(not_needed(u) if grad is None else grad.to(tensor.dtype) for tensor, grad in zip(inputs, grads, strict=True))  # type: ignore[union-attr]


def update_forward(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    if B.dim() != C.dim() or B.shape[1] != C.shape[1]:  # the kernel takes one number of groups
        B, C = with_heads(state, x, dt, A, B, C, D, z, dt_bias)[4:6]
    dt, B, C, z, D, dt_bias = (t if t is None or t.dtype in _DTYPES else t.float() for t in (dt, B, C, z, D, dt_bias))  # type: ignore[assignment]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    library = cuda.library()
    assert library is not None
    library.scan_state_update(cuda.stream(x), state, x, dt, A.to(_FLOAT32), B, C, D, z, dt_bias, dt_softplus, y)
    torch.autograd.graph.increment_version(state)
    return y


def _scan_limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    states, length = arguments["A"].shape[1], arguments["u"].shape[2]
    found = [f"A has {states} states, more than {MOST_STATES}"] if states > MOST_STATES else []
    return [*found, f"u has {length} steps, more than 2^30"] if length > 2**30 else found


def _update_limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    state = arguments["state"]
    return [] if state.dtype in _DTYPES else [f"state is {state.dtype}, not one of {', '.join(map(str, _DTYPES))}"]


_OPTIONS: dict[str, Any] = {"dtypes": tuple(_DTYPES), "devices": ("cuda",), "unavailable": cuda.reason}
BACKENDS = (
    Backend(
        "selective_scan", "cuda", scan_forward, scan_backward, limits=_scan_limits, by_default=cuda.by_default("selective_scan", "u"), **_OPTIONS
    ),
    Backend(
        "selective_state_update", "cuda", update_forward, limits=_update_limits, by_default=cuda.by_default("selective_state_update", "x"), **_OPTIONS
    ),
)
