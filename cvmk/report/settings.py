"""Configurations of runs beside each other: what differs, and what is not at its default."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from cvmk.config.schema import TrainConfig
from cvmk.config.section import walk

_PLACES = ("run.folder",)
"""Keys that differ between any two runs and change nothing."""
_LONGEST = 120


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) of a nested configuration, in its order."""
    for name, value in _used(values).items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _used(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a teacher that is there already, only where: what it would be trained by is not looked at."""
    return {"path": table["path"]} if isinstance(table.get("path"), str) and "model" in table else table


def defaults() -> dict[str, Any]:
    """Every key of the schema that has a default, as JSON holds it."""
    found = {}
    for name, field, table in walk(TrainConfig):
        value = field.get_default(call_default_factory=True)
        if table is None and value is not PydanticUndefined:
            found[name] = to_jsonable_python(value)
    return found


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The keys that are not the same in all configurations, with the value of each as TOML would say it; "" where it has none.

    Of a table that only some have, what is at its default is left out.
    """
    tables, usual = [dict(flat(config)) for config in configs], defaults()
    keys = dict.fromkeys(key for table in tables for key in table)
    found = {}
    for key in keys:
        if any(key not in table for table in tables) and all(table.get(key, usual.get(key)) == usual.get(key) for table in tables if key in table):
            continue
        values = [written(table[key]) if key in table else "" for table in tables]
        if key not in _PLACES and len(set(values)) > 1:
            found[key] = values
    return found


def changed(config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The keys that are not at their defaults: their values, and the defaults ("" where the key has none)."""
    usual = defaults()
    found = {}
    for key, value in flat(config):
        default = usual.get(key)
        if value != default and not (value is None and key not in usual):
            found[key] = (written(value), "" if default is None else written(default))
    return found


def written(value: Any) -> str:
    """A value for a person to read, cut where it is long."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text or '""'
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
