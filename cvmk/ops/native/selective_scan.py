"""Selective scan and its single step by the native CPU kernels (csrc/scan says how they work).

They compute in float32 whatever the inputs' dtypes are (float64 inputs go to the reference) and take any strides. A number below
the smallest normal one, 1.2e-38, counts as 0; infinities and NaN follow the formulas and stay within their sequence and channel,
but for dB and dC, which are sums over channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._dtypes import not_needed
from cvmk.ops.native import library, reason
from cvmk.ops.selective_scan import SCAN_CHUNK, ScanCall, ScanOut, UpdateCall, sequences_of, with_heads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32 = torch.float32


def _readable(tensor: Tensor) -> Tensor:
    """In a dtype that the kernels read."""
    return tensor if tensor.dtype in DTYPES else tensor.float()


def _plain(tensor: Tensor | None) -> Tensor | None:
    """In float32 and contiguous."""
    if tensor is None or (tensor.dtype is _FLOAT32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(_FLOAT32).contiguous()


def readable_scan(c: ScanCall) -> tuple[Any, ...]:
    """The arguments of a scan as the kernels read them: steps in any strides and one of DTYPES, the rest in float32 and contiguous."""
    u, delta, A, B, C, D, z, bias, initial, cu_seqlens, softplus, reverse, _ = c
    B, C = (_readable(weights) if weights.dim() == 4 else _plain(weights) for weights in (B, C))  # type: ignore[assignment]
    return (
        *(u, _readable(delta), _plain(A), B, C, _plain(D), None if z is None else _readable(z), _plain(bias), _plain(initial)),
        *(None if cu_seqlens is None else cu_seqlens.contiguous(), softplus, reverse),
    )


def results_of(c: ScanCall) -> ScanOut:
    """Where a scan's results go."""
    batch, dim, length = c.u.shape
    states, device = c.A.shape[1], c.u.device
    last = torch.empty((sequences_of(c), dim, states), dtype=_FLOAT32, device=device)
    kept = torch.empty((batch, -(-length // SCAN_CHUNK) * dim, states) if c.keep_states else (0,), dtype=_FLOAT32, device=device)
    return ScanOut(torch.empty((batch, dim, length), dtype=c.u.dtype, device=device), last, kept)


def gradients_of(c: ScanCall, needs: Any) -> list[Tensor | None]:
    """Where the gradients go: those of steps come in a dtype that the kernels write, the others in float32; float64 ones are widened at the end."""
    stepwise = (True, True, False, c.B.dim() == 4, c.C.dim() == 4, False, True, False, False)
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype if written and tensor.dtype in DTYPES else _FLOAT32, device=tensor.device)
        if needed and tensor is not None
        else None
        for tensor, written, needed in zip(c[:9], stepwise, needs, strict=True)
    ]


def as_inputs(c: ScanCall, grads: list[Tensor | None]) -> tuple[Tensor, ...]:
    """Gradients in the dtypes of what they are gradients of."""
    return tuple(not_needed(c.u) if grad is None else grad.to(tensor.dtype) for tensor, grad in zip(c[:9], grads, strict=True))  # type: ignore[union-attr]


def scan_forward(c: ScanCall) -> ScanOut:
    found = results_of(c)
    _native.scan_forward(*readable_scan(c), found.out, found.last_state, found.states if c.keep_states else None)
    return found


def scan_backward(g: ScanOut, c: ScanCall, saved: ScanOut, needs: Any) -> tuple[Tensor, ...]:
    grads = gradients_of(c, needs)
    grad_out = None if g.out is None else _readable(g.out)
    _native.scan_backward(*readable_scan(c), grad_out, _plain(g.last_state), saved.states.contiguous(), *grads)
    return as_inputs(c, grads)


def update_forward(c: UpdateCall) -> Tensor:
    state, x, dt, A, B, C, D, z, dt_bias, softplus = readable_update(c)
    y = torch.empty(x.shape, dtype=x.dtype)
    _native.scan_state_update(state, x, dt, A, B, C, D, z, dt_bias, softplus, y)
    return y


def readable_update(c: UpdateCall) -> UpdateCall:
    """A step as the kernels read it: one number of groups, A in float32."""
    if c.B.dim() != c.C.dim() or c.B.shape[1] != c.C.shape[1]:
        whole = with_heads(c)
        c = c._replace(B=whole.B, C=whole.C)
    if all(tensor is None or tensor.dtype in DTYPES for tensor in c[1:9]) and c.A.dtype is _FLOAT32:
        return c
    D, z, dt_bias = (None if tensor is None else _readable(tensor) for tensor in (c.D, c.z, c.dt_bias))
    return UpdateCall(c.state, c.x, _readable(c.dt), c.A.float(), _readable(c.B), _readable(c.C), D, z, dt_bias, c.dt_softplus)


def _unavailable() -> str | None:
    if _native is None:
        return reason()
    return None if hasattr(_native, "scan_forward") else "the native library was built without the kernels of the scan"


def update_limits(which: str, c: UpdateCall) -> list[str]:
    return [] if c.state.dtype in DTYPES else [f"state is {c.state.dtype}, not one of {', '.join(map(str, DTYPES))}"]


_native: Any = library()
_OPTIONS: dict[str, Any] = {"dtypes": DTYPES, "devices": ("cpu",), "unavailable": _unavailable}
BACKENDS = (
    Backend("selective_scan", "native", scan_forward, scan_backward, **_OPTIONS),
    Backend("selective_state_update", "native", update_forward, limits=update_limits, **_OPTIONS),
)
