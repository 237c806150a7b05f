"""The native libraries of cvmk: whether they are there, why not, and the instruction-set level that kernels use.

Importing this module never fails and needs nothing but the standard library: the server asks it without torch.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import cvmk
from cvmk.errors import ConfigError

LEVELS = ("base", "avx2", "avx512", "amx")
"""Instruction-set levels, the lowest first. `CVMK_CPU_ISA` takes one of these names, and after it features to do without, each behind a "-":
`avx512-avx512_vnni-avx512_bf16` is the first processors' AVX-512. The names are those that `cvmk doctor` prints."""


BACKENDS = ("cuda", "triton", "native", "reference")
"""The backends of the ops, in the order in which they are asked."""


def check_environment() -> None:
    """Raises ConfigError where an environment variable of cvmk makes no sense: CVMK_BACKEND, CVMK_CPU_ISA, CVMK_KEPT_MIB."""
    allowed_backends()
    isa_level()
    kept = os.environ.get("CVMK_KEPT_MIB", "")
    if kept and not (kept.isascii() and kept.isdigit()):
        raise ConfigError(f"CVMK_KEPT_MIB is {kept!r}: set it to a number of MiB, or unset it")


def allowed_backends() -> tuple[str, ...]:
    """The backends that the environment variable CVMK_BACKEND allows (names separated by commas), in its order; empty where it allows all.

    Raises ConfigError for a name that is no backend.
    """
    names = tuple(name.strip() for name in os.environ.get("CVMK_BACKEND", "").split(",") if name.strip())
    for name in names:
        if name not in BACKENDS:
            raise ConfigError(f"CVMK_BACKEND names the backend {name!r}; the backends are {', '.join(BACKENDS)}")
    return names


def isa_level() -> str:
    """The level that kernels are dispatched to: the processor's, capped by the environment variable CVMK_CPU_ISA.

    "base" without the native library. Raises ConfigError where CVMK_CPU_ISA makes no sense.
    """
    native, _ = load("_native", "native")
    if native is None:
        return LEVELS[0]
    try:
        return str(native.dispatch_level())
    except ValueError as error:
        raise ConfigError(str(error)) from None


@functools.cache
def load(module: str, part: str) -> tuple[ModuleType | None, str | None]:
    """Import the extension module `cvmk.<module>`; where that fails, None and the reason (a sentence without its full stop).

    `part` is the module's key in the build record: "native" for `_native`, "cuda" for `_native_cuda`.
    """
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
                record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                return {}
            return record
    return {}


def _not_built(part: str) -> str:
    recorded = build_record().get(part, {}).get("reason")
    return recorded or "it was not built: the package was installed with CVMK_NATIVE=OFF or is used from its source folder"
