"""Named ranges on a profiler's timeline (Nsight Systems, Nsight Compute), through NVTX.

A profiler that listens says so in the environment of the process that it starts (NVTX_INJECTION64_PATH); CVMK_NVTX=1 says it for one that
attaches later, CVMK_NVTX=0 turns ranges off. Where nobody listens, or PyTorch was built without CUDA, a range is an object that does nothing.
A profiler of this process (`cvmk train --profile`) hears of every range for as long as it is `told`.
Imports nothing of cvmk, and PyTorch at the first range that is listened to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def _listened_to() -> bool:
    wanted = os.environ.get("CVMK_NVTX", "")
    return wanted == "1" or (wanted != "0" and bool(os.environ.get("NVTX_INJECTION64_PATH")))


LISTENING = _listened_to()
"""Whether ranges are recorded in this process."""


_record: Callable[[str], AbstractContextManager[Any]] | None = None


def span(name: str) -> AbstractContextManager[Any]:
    """A range of this name around a block."""
    if _record is not None:
        return _record(name)
    return _recorded(name) if LISTENING else _NOTHING


@contextlib.contextmanager
def told(record: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Until the block ends, ranges are those that `record` makes of their names."""
    global _record
    before, _record = _record, record
    try:
        yield
    finally:
        _record = before


def spanned(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a range of this name around every call."""

    def call(*arguments: Any) -> Any:
        with span(name):
            return function(*arguments)

    return call


@contextlib.contextmanager
def _recorded(name: str) -> Iterator[None]:
    import torch

    if torch.version.cuda is None:  # its NVTX functions are there and raise
        yield
        return
    torch.cuda.nvtx.range_push(f"cvmk: {name}")
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
