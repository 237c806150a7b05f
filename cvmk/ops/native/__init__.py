"""Backends that run on the native CPU library `cvmk._native`, one file an op, and whether that library is there."""

from __future__ import annotations

from types import ModuleType

from cvmk.libraries import LEVELS, isa_level, load

__all__ = ["LEVELS", "isa_level", "library", "reason"]


def library() -> ModuleType | None:
    """The module `cvmk._native`, or None where it was not built or does not load (`reason` says why)."""
    return load("_native", "native")[0]


def reason() -> str | None:
    """Why `library()` is None: one sentence without its full stop; None where the library is there."""
    return load("_native", "native")[1]
