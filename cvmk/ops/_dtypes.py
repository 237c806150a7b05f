"""Dtypes of accumulation and of autocast, and the place holder for a tensor that nobody asked for."""

from __future__ import annotations

from typing import TypeVarTuple, cast

import torch

from cvmk.ops._watch import autocast_enabled

_Tensors = TypeVarTuple("_Tensors")


def autocast_dtype(*tensors: torch.Tensor | None) -> torch.dtype | None:
    """The type to which autocast casts the operands of a matrix product; None where it is off."""
    if not autocast_enabled():
        return None
    device = next(t.device.type for t in tensors if t is not None)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast_lower(*tensors: *_Tensors) -> tuple[*_Tensors]:
    """Under autocast: floating tensors cast to its dtype, as autocast does for matrix products. Else, and where None stands for a tensor, unchanged."""
    given = cast("tuple[torch.Tensor | None, ...]", tensors)
    dtype = autocast_dtype(*given)
    if dtype is None:
        return tensors
    lowered = tuple([t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in given])
    return cast("tuple[*_Tensors]", lowered)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: the dtype of sums, exponentials and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def not_needed(like: torch.Tensor) -> torch.Tensor:
    """The place holder for a gradient or output that nobody asked for."""
    return like.new_empty(0)
