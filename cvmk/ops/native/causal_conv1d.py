"""The short causal convolution and its single step on the CPU kernels of csrc/conv: rows of time without gaps, or channels last; sums in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._storage import with_memory
from cvmk.ops.causal_conv1d import ConvCall, ConvOut, UpdateCall
from cvmk.ops.native import library, reason
from cvmk.ops.native._memory import empty

_NATIVE: Any = library()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 8
"""csrc/conv/params.h."""


def _floats(tensor: Tensor | None) -> Tensor | None:
    """In float32 and without gaps."""
    return None if tensor is None else with_memory(tensor).float().contiguous()


def _steps(tensor: Tensor, channels_last: bool) -> Tensor:
    """Inputs, results or their gradients, as the kernels read them."""
    tensor = with_memory(tensor)
    return tensor if channels_last and tensor.stride(2) == 1 else tensor.contiguous()


def _readable(c: ConvCall) -> tuple[Any, ...]:
    """The fields as the kernels read them."""
    lengths, last = None if c.lengths is None else c.lengths.contiguous(), c.channels_last
    return _steps(c.x, last), _floats(c.weight), _floats(c.bias), _floats(c.initial_state), lengths, c.silu, last, c.reverse


def forward(c: ConvCall) -> ConvOut:
    if c.reverse and not c.channels_last:
        out, last = forward(c._replace(x=c.x.mT, channels_last=True))
        return ConvOut(out.mT, last)
    out, last = empty(c.x.shape, c.x.dtype), c.x.new_empty((c.x.shape[0], *c.weight.shape[:1], c.weight.shape[1] - 1))
    _NATIVE.causal_conv1d_forward(*_readable(c), out, last)
    return ConvOut(out, last)


def backward(g: ConvOut, c: ConvCall, saved: ConvOut, needs: Needs) -> tuple[Tensor | None, ...]:
    if c.reverse and not c.channels_last:
        of_out = None if g.out is None else g.out.mT
        found, *rest = backward(ConvOut(of_out, g.last_state), c._replace(x=c.x.mT, channels_last=True), saved, needs)
        return None if found is None else found.mT, *rest
    given = (None if g.out is None else _steps(g.out, c.channels_last), None if g.last_state is None else with_memory(g.last_state).contiguous())
    dx = empty(c.x.shape, c.x.dtype) if needs.x else None
    others = [
        torch.empty(tensor.shape, dtype=torch.float32) if needed and tensor is not None else None
        for tensor, needed in ((c.weight, needs.weight), (c.bias, needs.bias), (c.initial_state, needs.initial_state))
    ]
    _NATIVE.causal_conv1d_backward(*_readable(c), *given, dx, *others)
    return dx, *(None if grad is None or tensor is None else grad.to(tensor.dtype) for grad, tensor in zip(others, c[1:4], strict=True))


def update_forward(c: UpdateCall) -> Tensor:
    y = c.x.new_empty(c.x.shape)
    _NATIVE.causal_conv1d_update(c.state, with_memory(c.x).contiguous(), _floats(c.weight), _floats(c.bias), c.silu, y)
    return y


def _limits(which: str, c: ConvCall) -> list[str]:
    width = c.weight.shape[1]
    return [] if width <= MAX_WIDTH else [f"the width is {width}, more than {MAX_WIDTH}"]


def _update_limits(which: str, c: UpdateCall) -> list[str]:
    found = [] if c.state.dtype in DTYPES else [f"state is {c.state.dtype}, not one of {', '.join(map(str, DTYPES))}"]
    return found if c.state.is_contiguous() else [*found, "state has gaps"]


def unavailable() -> str | None:
    """Why these kernels cannot run in this process, or None."""
    there = _NATIVE is None or hasattr(_NATIVE, "causal_conv1d_forward")
    return reason() if there else "cvmk._native is an older build without causal_conv1d: install the package again"


_OPTIONS: dict[str, Any] = {"dtypes": DTYPES, "devices": ("cpu",), "unavailable": unavailable}
BACKENDS = (
    Backend("causal_conv1d", "native", forward, backward, limits=_limits, **_OPTIONS),
    Backend("causal_conv1d_update", "native", update_forward, limits=_update_limits, **_OPTIONS),
)
