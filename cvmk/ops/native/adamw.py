"""`adamw` on the CPU library: one pass over flat memory in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops.adamw import Call, numbers
from cvmk.ops.native import library, reason

_NATIVE: Any = library()


def forward(c: Call) -> None:
    _NATIVE.adamw(*c[:5], *numbers(c))


def _limits(which: str, c: Call) -> list[str]:
    tensors: dict[str, Tensor] = {"param": c.param, "exp_avg": c.exp_avg, "exp_avg_sq": c.exp_avg_sq, "grad": c.grad}
    return [f"{name} is not contiguous" for name, tensor in tensors.items() if not tensor.is_contiguous()]


def _unavailable() -> str | None:
    if _NATIVE is None:
        return reason()
    return None if hasattr(_NATIVE, "adamw") else "the native library was built without the kernels of optimisers"


BACKENDS = (Backend("adamw", "native", forward, dtypes=(torch.float32,), devices=("cpu",), limits=_limits, unavailable=_unavailable),)
