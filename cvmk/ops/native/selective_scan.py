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

_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_NO_VIEW, _NO_WEIGHTS = (0,) * 5, (0,) * 6
_FLOAT32 = torch.float32
_increment_version = torch.autograd.graph.increment_version


def _readable(tensor: Tensor) -> Tensor:
    """In a dtype that the kernels read."""
    return tensor if tensor.dtype in _CODES else tensor.float()


def _plain(tensor: Tensor | None) -> Tensor | None:
    """In float32 and contiguous."""
    return None if tensor is None else tensor.to(_FLOAT32).contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _view(tensor: Tensor | None) -> tuple[int, ...]:
    return _NO_VIEW if tensor is None else (tensor.data_ptr(), _CODES[tensor.dtype], *tensor.stride())


class _Call:
    """The numbers that describe the inputs of a scan, and the tensors that must live as long as they are used."""

    def __init__(
        self,
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
    ) -> None:
        self.batch, self.dim, self.length = u.shape
        self.states = A.shape[1]
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        groups = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
        delta, z = _readable(delta), None if z is None else _readable(z)
        B, C = (_readable(weights) if weights.dim() == 4 else weights.to(_FLOAT32).contiguous() for weights in (B, C))
        small = [_plain(tensor) for tensor in (A, D, bias, initial)]
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.tensors = (u, delta, z, B, C, *small, cu_seqlens)
        self.numbers = (
            *(self.batch, self.dim, self.length, self.states, groups, softplus, reverse),
            *(*_view(u), *_view(delta), *_view(z)),
            *((*_view(B), 0) if B.dim() == 4 else (*_NO_WEIGHTS, B.data_ptr())),
            *((*_view(C), 0) if C.dim() == 4 else (*_NO_WEIGHTS, C.data_ptr())),
            *map(_pointer, small),
            *((0, 0, 0) if cu_seqlens is None else (cu_seqlens.data_ptr(), cu_seqlens.element_size(), self.sequences)),
        )


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
    call = _Call(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse)
    out = torch.empty((call.batch, call.dim, call.length), dtype=u.dtype)
    last = torch.empty((call.sequences, call.dim, call.states), dtype=_FLOAT32)
    chunks = -(-call.length // SCAN_CHUNK)
    kept = torch.empty((call.batch, chunks * call.dim, call.states) if keep_states else (0,), dtype=_FLOAT32)
    _native.scan_forward((*call.numbers, out.data_ptr(), last.data_ptr(), kept.data_ptr() if keep_states else 0))
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
    call = _Call(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse)
    grad_out = None if grad_out is None else _readable(grad_out)
    grad_last_state, states = _plain(grad_last_state), states.contiguous()
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    # Gradients of steps come in a dtype that the kernels write, the others in float32; float64 ones are widened at the end.
    stepwise = (True, True, False, B.dim() == 4, C.dim() == 4, False, True, False, False)
    grads = [
        torch.empty(tensor.shape, dtype=tensor.dtype if written and tensor.dtype in _CODES else _FLOAT32) if needed and tensor is not None else None
        for tensor, written, needed in zip(inputs, stepwise, needs, strict=False)
    ]
    _native.scan_backward((*call.numbers, *_view(grad_out), _pointer(grad_last_state), states.data_ptr(), *map(_pointer, grads)))
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
    return [] if state.dtype in _CODES else [f"state is {state.dtype}, not one of {', '.join(map(str, _CODES))}"]


_native: Any = library()
_OPTIONS: dict[str, Any] = {"dtypes": tuple(_CODES), "devices": ("cpu",), "unavailable": _unavailable}
BACKENDS = (
    Backend("selective_scan", "native", scan_forward, scan_backward, **_OPTIONS),
    Backend("selective_state_update", "native", update_forward, limits=_limits, **_OPTIONS),
)
