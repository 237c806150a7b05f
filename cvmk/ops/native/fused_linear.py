"""`fused_linear` on the CPU kernels of csrc/linear: bfloat16 products in pairs where the processor has them, else float32; sums in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs, make
from cvmk.ops._dropout import NO_DROPOUT, words
from cvmk.ops.fused_linear import Call, Out, kept_dtype, kept_shape
from cvmk.ops.native import library, reason
from cvmk.ops.native._linear import INPUT_TYPES, result, rows_of, vector
from cvmk.ops.native._memory import LARGE, empty
from cvmk.ops.quantize import ACTIVATION_NUMBERS, outputs

_NATIVE: Any = library()


_NOTHING = torch.empty(0, dtype=torch.uint8)
"""What is kept where nothing is; never written to, and of a dtype without gradients, so that calls can share it."""


def _arguments(c: Call, kept: Tensor) -> tuple[Any, ...]:
    bias = c.bias
    if bias is not None and not bias.is_contiguous():
        bias = vector(bias)
    dropout = NO_DROPOUT if c.dropout_seed is None else words(c.dropout_seed, c.dropout_p)
    return rows_of(c.x), rows_of(c.weight), bias, kept if kept.numel() else None, ACTIVATION_NUMBERS[c.activation], *dropout


def forward(c: Call) -> Out:
    out = result(c.x, outputs(c.weight.shape[0], c.activation), c.dtype)
    if c.activation is None or (not c.keep and c.activation == "relu"):
        kept = _NOTHING
    else:
        kept = empty(kept_shape(c), kept_dtype(c))
    _NATIVE.linear_forward(*_arguments(c, kept), out)
    return make(Out, (out, kept))


def _fresh(like: Tensor | None, wanted: bool) -> Tensor | None:
    if like is None or not wanted:
        return None
    return like.new_empty(like.shape) if like.numel() < LARGE // 4 else empty(like.shape, like.dtype)  # an element has four bytes at most


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    found = _fresh(c.x, needs.x), _fresh(c.weight, needs.weight), _fresh(c.bias, needs.bias)
    _NATIVE.linear_backward(*_arguments(c, saved.kept), rows_of(grads.out), *found)
    return found


def limits(which: str, c: Call) -> list[str]:
    found = []
    for name, tensor in (("weight", c.weight), ("bias", c.bias)):
        if tensor is not None and tensor.dtype not in INPUT_TYPES:
            found.append(f"{name} is {tensor.dtype}, not one of {', '.join(map(str, INPUT_TYPES))}")
    return found


def unavailable() -> str | None:
    """Why these kernels cannot run in this process, or None."""
    if _NATIVE is None or hasattr(_NATIVE, "linear_forward"):
        return reason()
    return "cvmk._native is an older build without fused_linear: install the package again"


BACKENDS = (
    Backend("fused_linear", "native", forward, backward, dtypes=INPUT_TYPES, devices=("cpu",), limits=limits, unavailable=unavailable),
)
