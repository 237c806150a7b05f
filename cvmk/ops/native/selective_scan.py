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
from cvmk.ops._call import make
from cvmk.ops.native import library, reason
from cvmk.ops.selective_scan import SCAN_CHUNK, ScanCall, ScanOut, UpdateCall, sequences_of, sizes_of, with_heads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32 = torch.float32
_NOTHING = torch.empty(0)


def _readable(tensor: Tensor) -> Tensor:
    """In a dtype that the kernels read."""
    return tensor if tensor.dtype in DTYPES else tensor.float()


def _plain(tensor: Tensor | None) -> Tensor | None:
    """In float32 and contiguous."""
    return None if tensor is None else tensor.to(_FLOAT32).contiguous()


def readable_scan(c: ScanCall) -> ScanCall:
    """The arguments of a scan as the kernels read them: steps in any strides and one of DTYPES, the rest in float32 and contiguous."""
    B, C = (_readable(weights) if weights.dim() == 4 else weights.to(_FLOAT32).contiguous() for weights in (c.B, c.C))
    z, cu_seqlens = None if c.z is None else _readable(c.z), None if c.cu_seqlens is None else c.cu_seqlens.contiguous()
    D, bias, initial = _plain(c.D), _plain(c.delta_bias), _plain(c.initial_state)
    return ScanCall(c.u, _readable(c.delta), c.A.to(_FLOAT32).contiguous(), B, C, D, z, bias, initial, cu_seqlens, *c[10:])


def results_of(c: ScanCall) -> ScanOut:
    """Where a scan's results go."""
    batch, dim, length = sizes_of(c)
    states, numbers = c.A.shape[1], c.A if c.A.dtype is _FLOAT32 else torch.empty((), dtype=_FLOAT32, device=c.A.device)
    kept = numbers.new_empty(batch, -(-length // SCAN_CHUNK) * dim, states) if c.keep_states else _NOTHING if c.u.is_cpu else numbers.new_empty(0)
    return make(ScanOut, (c.u.new_empty(*c.u.shape), numbers.new_empty(sequences_of(c), dim, states), kept))


def gradients_of(c: ScanCall, needs: Any) -> list[Tensor | None]:
    """Where the gradients go: those of steps come in a dtype that the kernels write, the others in float32; float64 ones are widened at the end."""
    stepwise = (True, True, False, c.B.dim() == 4, c.C.dim() == 4, False, True, False, False)
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype if written and tensor.dtype in DTYPES else _FLOAT32, device=tensor.device)
        if needed and tensor is not None
        else None
        for tensor, written, needed in zip(c[:9], stepwise, needs, strict=True)
    ]


def as_inputs(c: ScanCall, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of what they are gradients of."""
    return tuple([None if grad is None or tensor is None else grad.to(tensor.dtype) for tensor, grad in zip(c[:9], grads, strict=True)])


def readable_grads(g: ScanOut) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of out and of the last state as the kernels read them."""
    return None if g.out is None else _readable(g.out), _plain(g.last_state)


def _must(ran: int) -> None:
    """A kernel says 0 where it ran nothing, for it cannot read an argument as it lies."""
    if not ran:
        raise RuntimeError("the kernels of the scan read no copy of these arguments either")


def scan_forward(c: ScanCall) -> ScanOut:
    found = results_of(c)
    if not _native.scan_forward(*c, *found):
        _must(_native.scan_forward(*readable_scan(c), *found))
    return found


def scan_backward(g: ScanOut, c: ScanCall, saved: ScanOut, needs: Any) -> tuple[Tensor | None, ...]:
    grads = gradients_of(c, needs)
    if not _native.scan_backward(*c, g.out, g.last_state, saved.states, *grads):
        _must(_native.scan_backward(*readable_scan(c), *readable_grads(g), saved.states.contiguous(), *grads))
    return as_inputs(c, grads)


def update_forward(c: UpdateCall) -> Tensor:
    y = c.x.new_empty(*c.x.shape)
    if not _native.scan_state_update(*c, y):
        _must(_native.scan_state_update(*readable_update(c), y))
    return y


def readable_update(c: UpdateCall) -> UpdateCall:
    """A step as the kernels read it: one number of groups, one of DTYPES, A in float32."""
    state, x, dt, A, B, C, D, z, dt_bias, softplus = c
    if B.dim() != C.dim() or B.shape[1] != C.shape[1]:
        B, C = with_heads(c)[4:6]
    D, z, dt_bias = (None if tensor is None else _readable(tensor) for tensor in (D, z, dt_bias))
    return UpdateCall(state, x, _readable(dt), A.float(), _readable(B), _readable(C), D, z, dt_bias, softplus)


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
