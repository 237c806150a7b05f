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
from cvmk.ops.cuda import address
from cvmk.ops.native.selective_scan import _CODES, _Call, _view
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
) -> _Call:
    u, delta, B, C, z = (_along_time(tensor) for tensor in (u, delta, B, C, z))  # type: ignore[assignment]
    return _Call(u, delta, A, B, C, D, z, bias, initial, cu_seqlens, softplus, reverse)


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
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = torch.empty((call.sequences, call.dim, call.states), dtype=_FLOAT32, device=u.device)
    chunks = -(-call.length // SCAN_CHUNK)
    kept = torch.empty((call.batch, chunks * call.dim, call.states) if keep_states else (0,), dtype=_FLOAT32, device=u.device)
    library = cuda.library()
    assert library is not None
    library.scan_forward((*cuda.place(u), *call.numbers, out.data_ptr(), last.data_ptr(), kept.data_ptr() if keep_states else 0))
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
        grad_out = _along_time(grad_out if grad_out.dtype in _CODES else grad_out.float())
    grad_last_state = None if grad_last_state is None else grad_last_state.to(_FLOAT32).contiguous()
    states = states.contiguous()
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    # Gradients of steps come in a dtype that the kernels write, the others in float32; float64 ones are widened at the end.
    stepwise = (True, True, False, B.dim() == 4, C.dim() == 4, False, True, False, False)
    grads = [
        torch.empty(tensor.shape, dtype=tensor.dtype if written and tensor.dtype in _CODES else _FLOAT32, device=u.device)
        if needed and tensor is not None
        else None
        for tensor, written, needed in zip(inputs, stepwise, needs, strict=False)
    ]
    library = cuda.library()
    assert library is not None
    place = cuda.place(u)
    numbers = (*call.numbers, *_view(grad_out), address(grad_last_state), states.data_ptr(), *map(address, grads))
    workspace = torch.empty(max(1, library.scan_backward((*place, 0, *numbers))), dtype=_FLOAT32, device=u.device)
    library.scan_backward((*place, workspace.data_ptr(), *numbers))
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
    shape = x.shape
    state, x, dt, A, B, C, D, z, dt_bias = with_heads(state, x, dt, A, B, C, D, z, dt_bias)
    batch, heads, dim, states = state.shape
    dt, B, C, z, D, dt_bias = (t if t is None or t.dtype in _CODES else t.float() for t in (dt, B, C, z, D, dt_bias))  # type: ignore[assignment]
    A = A.to(_FLOAT32)
    y = torch.empty((batch, heads, dim), dtype=x.dtype, device=x.device)
    library = cuda.library()
    assert library is not None
    library.scan_state_update(
        (
            *cuda.place(x),
            *(batch, heads, dim, states, B.shape[1], dt_softplus),
            *_view(state),
            *(*_view(x), *_view(dt), *_view(z)),
            *(A.data_ptr(), *A.stride()),
            *(*_view(B), *_view(C)),
            *(*_row(D), *_row(dt_bias)),
            y.data_ptr(),
        )
    )
    torch.autograd.graph.increment_version(state)
    return y.view(shape)


def _row(tensor: Tensor | None) -> tuple[int, ...]:
    """[heads, dim], the same for the whole batch."""
    return (0,) * 5 if tensor is None else (tensor.data_ptr(), _CODES[tensor.dtype], 0, *tensor.stride())


def _scan_limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    states, length = arguments["A"].shape[1], arguments["u"].shape[2]
    found = [f"A has {states} states, more than {MOST_STATES}"] if states > MOST_STATES else []
    return [*found, f"u has {length} steps, more than 2^30"] if length > 2**30 else found


def _update_limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    state = arguments["state"]
    return [] if state.dtype in _CODES else [f"state is {state.dtype}, not one of {', '.join(map(str, _CODES))}"]


_OPTIONS: dict[str, Any] = {"dtypes": tuple(_CODES), "devices": ("cuda",), "unavailable": cuda.reason}
BACKENDS = (
    Backend(
        "selective_scan", "cuda", scan_forward, scan_backward, limits=_scan_limits, by_default=cuda.by_default("selective_scan", "u"), **_OPTIONS
    ),
    Backend(
        "selective_state_update", "cuda", update_forward, limits=_update_limits, by_default=cuda.by_default("selective_state_update", "x"), **_OPTIONS
    ),
)
