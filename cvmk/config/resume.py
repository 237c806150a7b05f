"""What a resumed run may have otherwise: the schema's marks, applied to the configuration before and now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from cvmk.config.section import BY_CONTENT, MAY_CHANGE, TABLES_MUST_MATCH, Formerly, OnResume, table_of


def changed_keys(schema: type[BaseModel], before: Mapping[str, Any], now: Mapping[str, Any], *, by_content: bool) -> list[str]:
    """The keys that differ and must not, in the schema's order. `before` and `now` are configurations as JSON holds them.

    With `by_content` the content of what the keys name is compared elsewhere: keys that say where it is may differ. A key
    that was left at its default before and now is the same, whatever the default was; one that `before` lacks, because an older cvmk
    wrote it, was left at its default.
    """
    free = {MAY_CHANGE, BY_CONTENT} if by_content else {MAY_CHANGE}
    return [key for key, mark in _differences(schema, before, now) if mark not in free]


def differing_keys(schema: type[BaseModel], before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, OnResume | None]:
    """All keys that differ, with their marks; defaults and keys that `before` lacks count as `changed_keys` counts them."""
    return dict(_differences(schema, before, now))


def _differences(
    schema: type[BaseModel], before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "", above: OnResume | None = None, strict: bool = False
) -> Iterator[tuple[str, OnResume | None]]:
    """Every key that differs, with its mark or that of the nearest table above; where `strict`, no mark counts."""
    for name, field in schema.model_fields.items():
        own = next((mark for mark in field.metadata if isinstance(mark, OnResume)), None)
        mark = None if strict else own or above
        default = _default(field)
        formerly = next((mark.value for mark in field.metadata if isinstance(mark, Formerly)), default)
        old, new = before.get(name, formerly), now.get(name, default)
        table = table_of(field.annotation)
        if table is not None and isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(table, old, new, f"{prefix}{name}.", mark, strict or above is TABLES_MUST_MATCH)
        elif old != new and (old, new) != (formerly, default):
            yield prefix + name, mark


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    return None if value is PydanticUndefined else to_jsonable_python(value)
