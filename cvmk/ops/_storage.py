"""Tensors that have elements and no memory behind them: refused before PyTorch's operations or a Triton kernel read what is not there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cvmk.ops._backend import Backend

CHECKING_MEMORY = ("native", "cuda")
"""Backends whose bindings look at every tensor themselves (csrc/bindings/tensor.h)."""


def guarded(backend: Backend) -> Backend:
    """The backend, its passes behind a check of every tensor that they are given: of the call, the gradients and the saved results."""
    behind = functools.partial(_guarded, backend.op)
    backward, with_gradient = (None if function is None else behind(function) for function in (backend.backward, backend.forward_with_gradient))
    return replace(backend, forward=behind(backend.forward), backward=backward, forward_with_gradient=with_gradient)


def _guarded(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*groups: Any) -> Any:
        for group in groups:
            for name, value in zip(getattr(group, "_fields", ()), group, strict=False):
                if isinstance(value, torch.Tensor):
                    refuse_without_memory(op, name, value)
        return function(*groups)

    return checked


def refuse_without_memory(op: str, name: str, tensor: torch.Tensor) -> None:
    """RuntimeError for a tensor that has elements and nothing behind them."""
    if has_no_memory(tensor):
        raise RuntimeError(f"{op}: {name} has no memory behind it: its storage was given back, or it is a zero tensor; fill the storage again, or pass a copy")


def has_no_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor has elements and nothing behind them: a zero tensor, or one whose storage was given back. Its address is then its offset into a
    storage that begins at 0; only addresses that may be so small are asked for more. False for tensors that are traced or on "meta"."""
    if tensor.is_meta:
        return False
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # no tensor with memory of its own, such as a transform's
        return False
    return address >> 40 == 0 and tensor.numel() != 0 and (address == 0 or address == tensor.storage_offset() * tensor.itemsize)
