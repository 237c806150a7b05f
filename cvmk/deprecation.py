"""Names that moved: the old module goes on working, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def moved(old: str, new: str, *names: str) -> Callable[[str], Any]:
    """The `__getattr__` of the module `old`, whose public names, or only `names`, are now those of the module `new`."""

    def get(name: str) -> Any:
        if name.startswith("_") or (names and name not in names):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(new), name)
        warnings.warn(f"{old}.{name} is now {new}.{name}: import it from there", DeprecationWarning, stacklevel=2)
        return value

    return get
