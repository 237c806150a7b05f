"""The native CPU library `cvmk._native`: whether it is there, why not, and the instruction-set level that its kernels use.

Importing this package never fails and imports nothing heavy. Backends of single ops stand beside this file.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import cvmk
from cvmk.errors import ConfigError

LEVELS = ("base", "avx2", "avx512", "amx")
"""Instruction-set levels, the lowest first; `CVMK_CPU_ISA` takes these names."""


def library() -> ModuleType | None:
    """The module `cvmk._native`, or None where it was not built or does not load (`reason` says why)."""
    return load("_native", "native")[0]


def reason() -> str | None:
    """Why `library()` is None: one sentence without a full stop; None where the library is there."""
    return load("_native", "native")[1]


def isa_level() -> str:
    """The level that kernels are dispatched to: the processor's, capped by the environment variable CVMK_CPU_ISA.

    "base" without the native library. Raises ConfigError where CVMK_CPU_ISA holds no level.
    """
    native = library()
    if native is None:
        return LEVELS[0]
    try:
        return str(native.dispatch_level())
    except ValueError as error:
        raise ConfigError(str(error)) from None


@functools.cache
def load(module: str, part: str) -> tuple[ModuleType | None, str | None]:
    """Import the extension module `cvmk.<module>`; where that fails, None and the reason. `part` is its key in the build record."""
    try:
        found = importlib.import_module(f"cvmk.{module}")
    except ModuleNotFoundError:
        return None, _not_built(part)
    except Exception as error:  # whatever a broken library does at import, cvmk works without it
        return None, f"cvmk.{module} is there but does not load: {error}"
    if found.version != cvmk.__version__:
        return None, f"cvmk.{module} was built for cvmk {found.version}, this is {cvmk.__version__}: install the package again"
    return found, None


def build_record() -> dict[str, Any]:
    """What the build wrote about itself: per part ("native", "cuda") choice, reason, compiler. Empty where CMake never ran.

    An editable install keeps the record with the libraries in another folder of `cvmk.__path__`.
    """
    for folder in cvmk.__path__:
        path = Path(folder) / "_native_build.json"
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                return {}
    return {}


def _not_built(part: str) -> str:
    recorded = build_record().get(part, {}).get("reason")
    return recorded or "it was not built: the package was installed with CVMK_NATIVE=OFF or is used from its source folder"
