"""What stands behind a tensor: memory at all, or PyTorch's operations and Triton's kernels would read what is not there; and for each element its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cvmk.ops._backend import Backend

CHECKING_MEMORY = ("native",)
"""Backends whose bindings look at every tensor themselves (csrc/bindings/tensor.h), and that copy none before but `with_memory`."""


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


def with_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is about to be copied, which ends the process where it has no memory. Raises RuntimeError there."""
    if has_no_memory(tensor):
        refuse_without_memory("a kernel's arguments", f"the tensor of shape {list(tensor.shape)}", tensor)
    return tensor


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


def shares_memory_with_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor lie at one place, as those of an expanded one do. PyTorch's own answer where it has one; for strides that are
    too hard for it (windows of `unfold` or `as_strided`), by the places themselves."""
    known = torch._debug_has_internal_overlap(tensor)
    if known != 2:
        return bool(known)
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                break
            reach += stride * (size - 1)
    else:
        return False
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        places = (places[:, None] + torch.arange(size, device="cpu") * stride).flatten()
    distinct: int = places.unique().numel()
    return distinct < places.numel()
