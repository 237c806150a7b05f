"""What every schema is made of: sections, the marks of their keys, and a walk over all keys."""

from __future__ import annotations

import enum
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

MAX_THREADS = 1024
"""The most threads that anything may be given."""


class Section(BaseModel):
    """A table of the TOML file. Unknown keys are errors, values are not coerced across types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Document(Section):
    """A whole TOML file."""

    COMMAND: ClassVar[str]
    """The command that reads it."""
    FIRST: ClassVar[tuple[str, ...]] = ()
    """The tables that stand first in an explanation; the others follow in the order of the schema."""
    OTHERS: ClassVar[dict[str, str]] = {}
    """Tables of another command, which reads the same file: by name, the command."""


class OnResume(enum.Enum):
    """What a run that is resumed may have otherwise. A key or table without a mark must be as it was."""

    MAY_CHANGE = enum.auto()
    BY_CONTENT = enum.auto()
    """It says where something is: it may change as long as what is there has the same content."""
    TABLES_MUST_MATCH = enum.auto()
    """A table whose own keys go by their own marks; everything in the tables below it must be as it was."""


MAY_CHANGE, BY_CONTENT, TABLES_MUST_MATCH = OnResume


@dataclass(frozen=True)
class Formerly:
    """What a run of an older cvmk did where this key was not given, if that is not what leaving it out means now."""

    value: Any


def table_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key of this type holds; None for a plain value."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def named_tables(annotation: Any) -> bool:
    """Whether a key of this type holds tables by names that the user chooses."""
    return typing.get_origin(annotation) is dict


def walk(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, type[BaseModel] | None]]:
    """Every key below `schema` as (dotted name, field, section or None), in the schema's order; NAME stands for a name that the user chooses."""
    for name, field in schema.model_fields.items():
        table = table_of(field.annotation)
        whole = f"{prefix}{name}.NAME" if named_tables(field.annotation) else prefix + name
        yield whole, field, table
        if table is not None:
            yield from walk(table, f"{whole}.")
