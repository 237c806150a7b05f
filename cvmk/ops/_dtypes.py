"""Dtypes of accumulation and of autocast, and the place holder for a tensor that nobody asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cvmk.ops._watch import autocast_enabled


def autocast_dtype(*tensors: torch.Tensor | None) -> torch.dtype | None:
    """The type to which autocast casts the operands of a matrix product; None where it is off."""
    device = _autocast_device(tensors)
    return None if device is None else torch.get_autocast_dtype(device)


def autocast_lower(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under autocast: floating tensors cast to its dtype, as autocast does for matrix products. Else unchanged."""
    dtype = autocast_dtype(*tensors)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def autocast_float32(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under autocast: half-precision tensors cast to float32, as autocast does for losses. Else unchanged."""
    device = _autocast_device(tensors)
    if device is None:
        return tensors
    return tuple(t.float() if t is not None and t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def _autocast_device(tensors: Sequence[torch.Tensor | None]) -> str | None:
    """The kind of device that the tensors are on, where autocast is on for it."""
    if not autocast_enabled():
        return None
    device = next(t.device.type for t in tensors if t is not None)
    return device if torch.is_autocast_enabled(device) else None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: the dtype of sums, exponentials and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def not_needed(like: torch.Tensor) -> torch.Tensor:
    """The place holder for a gradient or output that nobody asked for."""
    return like.new_empty(0)
