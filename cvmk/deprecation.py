"""Names that moved: the old module goes on working, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def moved(old: str, new: str, *names: str, **renamed: str) -> Callable[[str], Any]:
    """The `__getattr__` of the module `old`, whose public names are now those of the module `new`.

    Where `names` or `renamed` (old name=new name) are given, only these are found.
    """

    def get(name: str) -> Any:
        if name.startswith("_") or ((names or renamed) and name not in (*names, *renamed)):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        now = renamed.get(name, name)
        value = getattr(importlib.import_module(new), now)
        warnings.warn(f"{old}.{name} is now {new}.{now}: import it from there", DeprecationWarning, stacklevel=2)
        return value

    return get
