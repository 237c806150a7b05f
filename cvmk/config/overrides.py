"""`--set section.key=value`: applied to values, and written into the TOML text that a run keeps."""

from __future__ import annotations

import datetime
import json
import re
import tomllib
from collections.abc import Sequence
from typing import Any, NamedTuple

from cvmk.errors import ConfigError

_HEADER = re.compile(r"\s*\[([^\[\]]+)\]\s*(#.*)?\s*\Z")
_KEY = re.compile(r"""\s*([A-Za-z0-9_-]+|"[^"]*"|'[^']*')\s*=""")


class Override(NamedTuple):
    path: tuple[str, ...]
    value: Any


def parse_override(text: str) -> Override:
    """`text` is "section.key=value"; a value that is no TOML is a string. Raises ConfigError."""
    key, separator, given = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not separator or not all(path):
        raise ConfigError(f"--set {text!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {given}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        value = given.strip()  # a bare word is a string
    return Override(path, value)


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set in `values`, as TOML gives them, what `overrides` say. Raises ConfigError."""
    for text in overrides:
        path, value = parse_override(text)
        table = values
        for part in path[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {text!r}: {part} is a value, not a table")
        table[path[-1]] = value


def with_overrides(text: str, overrides: Sequence[str], origin: str = "--set") -> str:
    """The TOML `text` changed so that it says what `overrides` say. Comments and order stay where the change is a line, which `origin` then marks.

    Raises ConfigError for a wrong override. The text must be valid.
    """
    for override in overrides:
        wanted = tomllib.loads(text)
        apply_overrides(wanted, [override])
        edited = _edited(text, parse_override(override), origin)
        text = edited if _says(edited, wanted) else f"# written anew for {origin} {override}\n{dumps(wanted)}"
    return text


def without_table(text: str, name: str) -> str:
    """The TOML `text` without the table `name` and those below it. Comments and order of the rest stay where the table stands in lines of its own."""
    wanted = {key: value for key, value in tomllib.loads(text).items() if key != name}
    kept: list[str] = []
    inside = False
    for line in text.splitlines(keepends=True):
        if header := _HEADER.match(line):
            inside = header[1].split(".")[0].strip().strip("\"'") == name
        if not inside:
            kept.append(line)
    edited = "".join(kept)
    return edited if _says(edited, wanted) else dumps(wanted)


def _says(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return tomllib.loads(text) == wanted
    except tomllib.TOMLDecodeError:
        return False


def _edited(text: str, override: Override, origin: str) -> str:
    """`text` with the line of the key replaced, or a line added to its table, or the table added. The caller checks what it says."""
    *tables, key = override.path
    line = f"{_key(key)} = {toml_value(override.value)}  # {origin}\n"
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    section: list[str] = []
    start = 0 if not tables else None
    for number, found in enumerate(lines):
        if header := _HEADER.match(found):
            section = [part.strip().strip("\"'") for part in header[1].split(".")]
            if section == tables:
                start = number + 1
        elif section == tables and (name := _KEY.match(found)) and name[1].strip("\"'") == key:
            return "".join([*lines[:number], line, *lines[number + 1 :]])
    if start is None:
        return "".join([*lines, "\n", f"[{'.'.join(map(_key, tables))}]\n", line])
    return "".join([*lines[:start], line, *lines[start:]])


def dumps(values: dict[str, Any], prefix: str = "") -> str:
    """Plain values as TOML: a table's values first, then its tables."""
    lines = [f"{_key(name)} = {toml_value(value)}\n" for name, value in values.items() if not isinstance(value, dict)]
    for name, value in values.items():
        if isinstance(value, dict):
            full = prefix + _key(name)
            lines.append(f"\n[{full}]\n{dumps(value, full + '.')}")
    return "".join(lines)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _string(name)


def toml_value(value: Any) -> str:
    """A plain value on one line, as it stands behind `key =` and behind `--set key=`. What is None in a table is left out."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_key(name)} = {toml_value(inner)}' for name, inner in value.items() if inner is not None)} }}"
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return repr(value)  # int, float


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
