"""`fused_linear` on the CPU kernels of csrc/linear: bfloat16 products in pairs where the processor has them, else float32; sums in float32."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs, make
from cvmk.ops._dropout import words
from cvmk.ops.fused_linear import Call, Out, kept_dtype, kept_shape
from cvmk.ops.native import library, reason
from cvmk.ops.native._linear import INPUT_TYPES, result, rows_of, vector
from cvmk.ops.native._memory import empty
from cvmk.ops.quantize import ACTIVATION_NUMBERS, outputs

_NATIVE: Any = library()


def _arguments(c: Call, kept: Tensor | None) -> tuple[Any, ...]:
    bias = None if c.bias is None else vector(c.bias)
    dropout = words(c.dropout_seed, c.dropout_p)
    return rows_of(c.x), rows_of(c.weight), bias, kept if kept is not None and kept.numel() else None, ACTIVATION_NUMBERS[c.activation], *dropout


def forward(c: Call) -> Out:
    out = result(c.x, outputs(c.weight.shape[0], c.activation), c.dtype)
    kept = empty(kept_shape(c), kept_dtype(c))
    _NATIVE.linear_forward(*_arguments(c, kept), out)
    return make(Out, (out, kept))


def _fresh(like: Tensor | None, wanted: bool) -> Tensor | None:
    return empty(like.shape, like.dtype) if like is not None and wanted else None


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    found = _fresh(c.x, needs.x), _fresh(c.weight, needs.weight), _fresh(c.bias, needs.bias)
    _NATIVE.linear_backward(*_arguments(c, saved.kept), rows_of(grads.out), *found)
    return found


def limits(which: str, c: Call) -> list[str]:
    found = []
    for name, tensor in (("weight", c.weight), ("bias", c.bias)):
        if tensor is not None and tensor.dtype not in INPUT_TYPES:
            found.append(f"{name} is {tensor.dtype}, not one of {', '.join(map(str, INPUT_TYPES))}")
    if 0 in c.weight.shape:
        found.append(f"the weight is {list(c.weight.shape)}, without elements")
    return found


def unavailable() -> str | None:
    """Why these kernels cannot run in this process, or None."""
    if _NATIVE is None or hasattr(_NATIVE, "linear_forward"):
        return reason()
    return "cvmk._native is an older build without fused_linear: install the package again"


BACKENDS = (
    Backend("fused_linear", "native", forward, backward, dtypes=INPUT_TYPES, devices=("cpu",), limits=limits, unavailable=unavailable),
)
