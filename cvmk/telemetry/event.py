"""What every kind of event is: a class with a version, whose fields are JSON values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class Event:
    """Something that happened in a run. The fields are JSON values."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1
    RECORDED: ClassVar[bool] = True
    """Whether it is written to the run's logs, or only shown to whoever looks on."""

    def values(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}

    def text(self) -> str | None:
        """A line for a person; None where there is nothing to tell."""
        return None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The event with these values; what is no field of it is passed over.

        Raises ValueError where a field without a default is missing, or a value is of another JSON type than its field.
        """
        given: dict[str, Any] = {}
        for one in dataclasses.fields(cls):
            if one.name in values:
                given[one.name] = _read(cls.KIND, one.name, str(one.type), values[one.name])
            elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
                raise ValueError(f"event {cls.KIND!r} lacks {one.name!r}")
        return cls(**given)


_JSON: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)),
    "str": ("a text", lambda value: isinstance(value, str)),
    "list": ("a list", lambda value: isinstance(value, list)),
    "dict": ("an object", lambda value: isinstance(value, dict)),
}


def _read(kind: str, name: str, annotation: str, value: Any) -> Any:
    """The value of a field from the value in the file."""
    if value is None and annotation == "float":
        return math.nan
    if value is None and annotation.endswith("| None"):
        return None
    whole, _, inner = annotation.removesuffix(" | None").partition("[")
    meaning, fits = _JSON[whole]
    if not fits(value):
        raise ValueError(f"event {kind!r}: {name!r} is not {meaning}")
    if whole == "list" and (inner := inner.removesuffix("]")) in ("int", "float"):
        return [_read(kind, name, inner, one) for one in value]
    return value
