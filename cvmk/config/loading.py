"""TOML to configuration objects of any schema, with errors that name the key and the nearest known one."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from cvmk.config.overrides import apply_overrides
from cvmk.config.schema import TrainConfig
from cvmk.config.section import Document, named_tables, table_of, walk
from cvmk.errors import ConfigError
from cvmk.files import read_text

D = TypeVar("D", bound=Document)
_QUOTED = re.compile(r"'([^']*)'")


def load_config(schema: type[D], path: str | Path, overrides: Sequence[str] = ()) -> D:
    """The configuration in the TOML file `path` with `overrides` ("section.key=value") applied.

    Raises DataError where the file cannot be read, ConfigError for anything wrong in it. A pipe can be read only once: to keep its
    text, use `read_text` and `parse_config`.
    """
    return parse_config(schema, read_text(path), str(path), overrides)


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """`load_config` for `cvmk train`."""
    return load_config(TrainConfig, path, overrides)


def parse_config(schema: type[D], text: str, name: str, overrides: Sequence[str] = ()) -> D:
    """The configuration in the TOML `text` with `overrides` applied; `name` stands in the errors. Raises ConfigError."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error
    if not values and not overrides:
        raise ConfigError(f"the configuration {name} is empty; `{schema.COMMAND} --explain-config` lists the keys")
    apply_overrides(values, overrides)
    return check_values(schema, values, name)


def check_values(schema: type[D], values: dict[str, Any], name: str) -> D:
    """Check plain values (as TOML or JSON gives them) against the schema; `name` stands in the error message."""
    try:
        return schema.model_validate_json(json.dumps(values, default=_not_json))
    except ValidationError as error:
        problems = [_sentence(schema, detail) for detail in error.errors()]
        raise ConfigError(f"{name}: " + "; ".join(problems)) from error


def parse_train_config(values: dict[str, Any], name: str) -> TrainConfig:
    """`check_values` for `cvmk train`."""
    return check_values(TrainConfig, values, name)


def _not_json(value: Any) -> str:
    return f"{type(value).__name__} {value}"  # no key takes a TOML date, and the message shows it


def _sentence(schema: type[BaseModel], detail: ErrorDetails) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location) or "the configuration"
    kind, given = detail["type"], detail.get("input")
    if kind == "extra_forbidden" and key in (others := getattr(schema, "OTHERS", {})):
        return f"the table [{key}] is for `{others[key]}`: use that, or take the table out"
    if kind == "extra_forbidden":
        return f"unknown key {key}{_suggestion(schema, location)}"
    if kind == "missing":
        return f"{key} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        return f"{key}: {message}"
    if kind == "literal_error":
        message += _nearest(given, _QUOTED.findall(message))
    return f"{key} = {_shown(given)}: {message}"


def _nearest(given: Any, names: Sequence[str]) -> str:
    """The name that may have been meant, whatever its case and its hyphens: one that is alike, one with more or fewer words, or one by its initials."""
    word, plain = _plain(str(given)), {_plain(name): name for name in names}
    near = difflib.get_close_matches(word, list(plain), n=1, cutoff=0.6)
    near = near or [name for name in plain if {*name.split("_")} & {*word.split("_")} or word == "".join(part[:1] for part in name.split("_"))]
    return f"; did you mean '{plain[near[0]]}'?" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _suggestion(schema: type[BaseModel], location: Sequence[str]) -> str:
    """Where the key may have been meant: the nearest key of its table, or else the table that has it."""
    model = _section_at(schema, location[:-1])
    keys = list(model.model_fields) if model is not None else []
    wrong = location[-1]
    near = difflib.get_close_matches(wrong, keys, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join([*location[:-1], near[0]])}?"
    elsewhere = [name for name, _, _ in walk(schema) if name.split(".")[-1] == wrong and not _repeats(schema, name)]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; the keys there are {', '.join(keys)}" if keys else ""


def _section_at(schema: type[BaseModel], location: Sequence[str]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = schema
    parts = iter(location)
    for part in parts:
        field = model.model_fields.get(part) if model is not None else None
        model = table_of(field.annotation) if field is not None else None
        if field is not None and named_tables(field.annotation):
            next(parts, None)
    return model


def _repeats(schema: type[BaseModel], name: str) -> bool:
    """Whether the key is in a table of the same name and kind as one at the top: `teacher.model` has the keys of `model`."""
    parts = name.split(".")
    top = _section_at(schema, parts[1:2])
    return top is not None and _section_at(schema, parts[:2]) is top


def explain_config(schema: type[Document] = TrainConfig) -> str:
    """All keys with default, limits and meaning, as commented TOML."""
    lines = [f"# Every key of `{schema.COMMAND} CONFIG.toml`, with its default. A key without a default must be given where its table is.", ""]
    scalars: dict[str, list[str]] = {}
    titles = {"": ""}
    repeated: dict[str, list[str]] = {}
    for name, field, table in walk(schema):
        section, _, key = name.rpartition(".")
        if _repeats(schema, name):
            if table is not None and name.count(".") == 1:
                repeated.setdefault(section, []).append(f"[{name}]")
        elif table is not None:
            titles[name] = field.description or ""
            scalars.setdefault(name, [])
        else:
            scalars.setdefault(section, []).append(f"{_default(key, field)}  # {field.description} [{_type(field)}]")
    for section in sorted(scalars, key=lambda name: name != "" and name.split(".")[0] not in schema.FIRST):
        lines += [f"# {titles[section]}", f"[{section}]"] if section else []
        lines += scalars[section]
        if section in repeated:
            lines.append(f"# {', '.join(repeated[section])}: the keys of the tables of the same name, for the {section}")
        lines.append("")
    return "\n".join(lines)


def _default(key: str, field: Any) -> str:
    if field.default is PydanticUndefined or field.default is None:
        return f"# {key} ="
    return f"{key} = {json.dumps(field.default, ensure_ascii=False)}"


def _type(field: Any) -> str:
    limits = [f"{symbol} {getattr(m, attribute)}" for m in field.metadata for attribute, symbol in
              (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")) if getattr(m, attribute, None) is not None]
    return ", ".join([_type_name(field.annotation), *limits])


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if annotation is type(None):
        return "none"
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_type_name, arguments))}]" if arguments else name
