"""Which kernels have been tried on which kind of device, and the warning where they have not.

Kernels of the CPU are tested on the CPU that runs the tests. A GPU of a kind on which nobody has run a backend is another matter: its first use
there warns, once a process, and names the command that compares it with the reference and remembers the answer for this user.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

import cvmk

_warned: set[tuple[str, str]] = set()


class UnmeasuredBackendWarning(UserWarning):
    """A backend runs on a kind of device on which its kernels have not been measured or checked."""


def device_class(device: torch.device) -> str | None:
    """The kind of a GPU, such as "sm_90"; None for a device whose kernels the tests have run."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def warn_where_unmeasured(op: str, backend: str, device: torch.device) -> None:
    """Called where a backend is chosen, which happens once for calls of a kind; warns once a process, backend and kind of device."""
    if backend == "reference":  # plain PyTorch
        return
    kind = device_class(device)
    if kind is None or (backend, kind) in _warned or _in_repository(op, backend, kind) or passed(backend, kind):
        return
    _warned.add((backend, kind))
    warnings.warn(
        f"the {backend} kernels of cvmk have not been measured on a GPU of this kind ({kind}): `cvmk doctor --check` compares them with the reference, "
        'and remembers that they are right; ops.use("reference") or CVMK_BACKEND=reference does without them',
        UnmeasuredBackendWarning,
        stacklevel=2,
    )


def _in_repository(op: str, backend: str, kind: str) -> bool:
    """Whether the package says that the op's kernel was measured on this kind of device."""
    table: dict[str, frozenset[tuple[int, int]]] = getattr(importlib.import_module(f"cvmk.ops.{backend}"), "MEASURED", {})
    return kind in {f"sm_{major}{minor}" for major, minor in table.get(op, ())}


def record_path() -> Path:
    """Where the user's own checks are remembered: cvmk/checked.json in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cvmk" / "checked.json"


def passed(backend: str, kind: str) -> bool:
    """Whether a check of this version's backend on this kind of device is remembered."""
    versions = record().get(kind, {}).get(cvmk.__version__)
    return isinstance(versions, dict) and versions.get(backend) is True


@functools.cache
def record() -> dict[str, Any]:
    """{kind of device: {version: {backend: whether its check passed}}}; empty where nothing readable is there."""
    try:
        found = json.loads(record_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
        return {}
    return found if isinstance(found, dict) and all(isinstance(value, dict) for value in found.values()) else {}


def with_result(before: dict[str, Any], kind: str, results: dict[str, bool]) -> dict[str, Any]:
    """The record with the answers of a check, by backend, put in."""
    versions = before.get(kind, {})
    known = versions.get(cvmk.__version__, {})
    return before | {kind: versions | {cvmk.__version__: (known if isinstance(known, dict) else {}) | results}}


def forget() -> None:
    """Read the record anew, and warn anew."""
    record.cache_clear()
    _warned.clear()
