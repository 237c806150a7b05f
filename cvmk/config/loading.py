"""TOML to configuration objects, with errors that name the key and the nearest known one."""

from __future__ import annotations

import difflib
import json
import tomllib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from cvmk.config.schema import TrainConfig
from cvmk.errors import ConfigError, DataError


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration in the TOML file `path` with `overrides` ("section.key=value") applied.

    Raises DataError where the file cannot be read, ConfigError for anything wrong in it.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the configuration {path} is not UTF-8 text (byte {error.start})") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    if not values and not overrides:
        raise ConfigError(f"the configuration {path} is empty; `cvmk train --explain-config` lists the keys")
    for override in overrides:
        _apply(values, override)
    return parse_train_config(values, str(path))


def parse_train_config(values: dict[str, Any], name: str) -> TrainConfig:
    """Check plain values (as TOML or JSON gives them) against the schema; `name` stands in the error message."""
    try:
        return TrainConfig.model_validate_json(json.dumps(values, default=_not_json))
    except ValidationError as error:
        problems = [_sentence(detail) for detail in error.errors()]
        raise ConfigError(f"{name}: " + "; ".join(problems)) from error


def _not_json(value: Any) -> str:
    return f"{type(value).__name__} {value}"  # a TOML date: no key takes one, and the message shows it


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not separator or not all(path):
        raise ConfigError(f"--set {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    table = values
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {part} is a value, not a table")
    table[path[-1]] = value


def _sentence(detail: ErrorDetails) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location) or "the configuration"
    kind, given = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        return f"unknown key {key}{_suggestion(location)}"
    if kind == "missing":
        return f"{key} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        return f"{key}: {message}"
    return f"{key} = {_shown(given)}: {message}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _suggestion(location: Sequence[str]) -> str:
    """Where the key may have been meant: the nearest key of its table, or else the table that has it."""
    model = _model_at(location[:-1])
    keys = list(model.model_fields) if model is not None else []
    wrong = location[-1]
    near = difflib.get_close_matches(wrong, keys, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join([*location[:-1], near[0]])}?"
    elsewhere = [name for name, _, _ in walk(TrainConfig) if name.split(".")[-1] == wrong and not name.startswith("teacher.")]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; the keys there are {', '.join(keys)}" if keys else ""


def _model_at(location: Sequence[str]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = TrainConfig
    for part in location:
        field = model.model_fields.get(part) if model is not None else None
        model = _table(field.annotation) if field is not None else None
    return model


def _table(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, type[BaseModel] | None]]:
    """Every key below `model` as (dotted name, field, table class or None), in the schema's order."""
    for name, field in model.model_fields.items():
        table = _table(field.annotation)
        yield prefix + name, field, table
        if table is not None:
            yield from walk(table, f"{prefix}{name}.")


def explain_config() -> str:
    """All keys with default, limits and meaning, as commented TOML."""
    lines = ["# Every key of `cvmk train CONFIG.toml`, with its default. A key without a default must be given where its table is.", ""]
    scalars: dict[str, list[str]] = {}
    titles: dict[str, str] = {}
    for name, field, table in walk(TrainConfig):
        if name.startswith("teacher.") and name.split(".")[1] in TrainConfig.model_fields:
            continue  # the teacher's tables have the keys of the tables of the same name
        if table is not None:
            titles[name] = field.description or ""
            scalars.setdefault(name, [])
            continue
        section, _, key = name.rpartition(".")
        scalars.setdefault(section, []).append(f"{_default(key, field)}  # {field.description} [{_type(field)}]")
    first = ["run", "data", "tokenizer"]
    ordered = [*(name for name in scalars if name.split(".")[0] in first), *(name for name in scalars if name.split(".")[0] not in first)]
    for section, keys in ((name, scalars[name]) for name in ordered):
        lines += [f"# {titles[section]}", f"[{section}]", *keys]
        if section == "teacher":
            inner = ", ".join(f"[teacher.{name}]" for name, _, t in walk(TrainConfig) if t is not None and _model_at(["teacher", name]) is not None)
            lines.append(f"# {inner}: the keys of the tables of the same name, for the teacher")
        lines.append("")
    return "\n".join(lines)


def _default(key: str, field: Any) -> str:
    if field.default is PydanticUndefined or field.default is None:
        return f"# {key} ="
    return f"{key} = {json.dumps(field.default, ensure_ascii=False)}"


def _type(field: Any) -> str:
    annotation = field.annotation
    name = annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
    name = name.replace("typing.", "").replace("Literal", "one of ").replace("NoneType", "none")
    limits = [f"{symbol} {getattr(m, attribute)}" for m in field.metadata for attribute, symbol in
              (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")) if getattr(m, attribute, None) is not None]
    return ", ".join([name, *limits])
