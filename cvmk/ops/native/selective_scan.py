"""Selective scan and its single step by the native CPU kernels (csrc/scan says how they work).

They compute in float32 whatever the inputs' dtypes are (float64 inputs go to the reference) and take any strides. A number below
the smallest normal one, 1.2e-38, counts as 0; infinities and NaN follow the formulas and stay within their sequence and channel,
but for dB and dC, which are sums over channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvmk.ops._dispatch import Backend, not_needed
from cvmk.ops.native import library, reason
from cvmk.ops.selective_scan import SCAN_CHUNK, with_heads

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32 = torch.float32
_increment_version = torch.autograd.graph.increment_version


def _readable(tensor: Tensor) -> Tensor:
    """In a dtype that the kernels read."""
    return tensor if tensor.dtype in _DTYPES else tensor.float()


def _plain(tensor: Tensor | None) -> Tensor | None:
    """In float32 and contiguous."""
    if tensor is None or (tensor.dtype is _FLOAT32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(_FLOAT32).contiguous()


def readable_scan(
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
) -> tuple[Any, ...]:
    """The arguments of a scan as the kernels read them: steps in any strides and one of _DTYPES, the rest in float32 and contiguous."""
    if delta.dtype is not u.dtype:
        delta = _readable(delta)
    if z is not None and z.dtype is not u.dtype:
        z = _readable(z)
    B, C = (_readable(weights) if weights.dim() == 4 else _plain(weights) for weights in (B, C))  # type: ignore[assignment]
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    return u, delta, _plain(A), B, C, _plain(D), z, _plain(delta_bias), _plain(initial_state), cu_seqlens, delta_softplus, reverse


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
    batch, dim, length = u.shape
    states = A.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = u.new_empty((batch, dim, length))
    last = torch.empty((sequences, dim, states), dtype=_FLOAT32)
    kept = torch.empty((batch, -(-length // SCAN_CHUNK) * dim, states) if keep_states else (0,), dtype=_FLOAT32)
    call = readable_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse)
    _native.scan_forward(*call, out, last, kept if keep_states else None)
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
    call = readable_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse)
    grad_out = None if grad_out is None else _readable(grad_out)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    # Gradients of steps come in a dtype that the kernels write, the others in float32; float64 ones are widened at the end.
    stepwise = (True, True, False, B.dim() == 4, C.dim() == 4, False, True, False, False)
    grads = [
        torch.empty(tensor.shape, dtype=tensor.dtype if written and tensor.dtype in _DTYPES else _FLOAT32) if needed and tensor is not None else None
        for tensor, written, needed in zip(inputs, stepwise, needs, strict=False)
    ]
    _native.scan_backward(*call, grad_out, _plain(grad_last_state), states.contiguous(), *grads)
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
    y = x.new_empty(*x.shape)
    A = A if A.dtype is _FLOAT32 else A.float()
    dt, B, C = _readable(dt), _readable(B), _readable(C)
    z, D, dt_bias = None if z is None else _readable(z), None if D is None else _readable(D), None if dt_bias is None else _readable(dt_bias)
    _native.scan_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, y)
    _increment_version(state)
    return y


def _unavailable() -> str | None:
    if _native is None:
        return reason()
    return None if hasattr(_native, "scan_forward") else "the native library was built without the kernels of the scan"


def _limits(which: str, arguments: Mapping[str, Any]) -> list[str]:
    state = arguments["state"]
    return [] if state.dtype in _DTYPES else [f"state is {state.dtype}, not one of {', '.join(map(str, _DTYPES))}"]


_native: Any = library()
_OPTIONS: dict[str, Any] = {"dtypes": tuple(_DTYPES), "devices": ("cpu",), "unavailable": _unavailable}
BACKENDS = (
    Backend("selective_scan", "native", scan_forward, scan_backward, **_OPTIONS),
    Backend("selective_state_update", "native", update_forward, limits=_limits, **_OPTIONS),
)
