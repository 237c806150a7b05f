"""The space of a search: which keys, what they may be, and whether the configuration takes all of that."""

from __future__ import annotations

import copy
import difflib
import itertools
import math
import random
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from cvmk.config.loading import parse_train_config
from cvmk.config.overrides import toml_value
from cvmk.config.schema import TrainConfig
from cvmk.config.search import RangeConfig
from cvmk.config.section import walk
from cvmk.errors import ConfigError

_ALL = 2000
"""So many combinations are all checked; of more, the corners and a sample."""
_EACH = 64
"""So many numbers of a range of whole numbers are all checked."""
_REFUSED = {
    "run.folder": "each trial has a folder of its own",
    "run.device": "it says where trials run, not how well they learn",
    "run.threads": "it says where trials run, not how well they learn",
    "data.cache": "it says where files are",
    "validation": "trials that are scored in another way cannot be compared",
    "data.valid": "trials that are scored on other text cannot be compared",
    "data.test": "it has no part in training",
}


class Space:
    """The keys of a search, in order, and `values`, the configuration that they vary, as TOML gives it.

    Raises ConfigError for a key that the configuration does not have or that cannot be searched, for a range of another type than its key, and
    for values or combinations that the configuration's own checks refuse.
    """

    def __init__(self, ranges: Mapping[str, RangeConfig], values: dict[str, Any], name: str) -> None:
        self.values, self._name = values, name
        fields = {key: field for key, field, table in walk(TrainConfig) if table is None}
        self.keys = {key: Key(key, _range(key, one, fields, values, name)) for key, one in ranges.items()}
        self._check()

    def shown(self) -> dict[str, Any]:
        """As the configuration says it."""
        return {key: one.range.shown() for key, one in self.keys.items()}

    def with_values(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with these keys set, as TOML gives it."""
        values = copy.deepcopy(self.values)
        for key, value in parameters.items():
            *tables, last = key.split(".")
            table = values
            for part in tables:
                table = table.setdefault(part, {})
            table[last] = value
        return values

    def searched(self, *prefixes: str) -> bool:
        """Whether a key is searched that is one of these or stands below one of them."""
        return any(_below(key, prefix) for key in self.keys for prefix in prefixes)

    def largest(self, key: str, default: int) -> int:
        """The largest value that the whole number `key` may have."""
        if key not in self.keys:
            return default
        return int(max(self.keys[key].samples()))

    def _check(self) -> None:
        for key, one in self.keys.items():
            for value in one.samples():
                self._try({key: value})
        for combination in self._combinations():
            self._try(dict(zip(self.keys, combination, strict=True)))

    def _try(self, parameters: dict[str, Any]) -> None:
        try:
            parse_train_config(self.with_values(parameters), self._name)
        except ConfigError as error:
            if len(parameters) == 1 and len(self.keys) > 1 and self._mended(*parameters.items()):
                return
            what = ", ".join(f"{key} = {toml_value(value)}" for key, value in parameters.items())
            why = str(error).removeprefix(f"{self._name}: ")
            raise ConfigError(f"{self._name}: search.space has {what}, which the configuration refuses: {why}") from error

    def _mended(self, *fixed: tuple[str, Any]) -> bool:
        """Whether a value that does not fit the configuration as it stands fits one of the trials' configurations."""
        return any(self._fits(dict(zip(self.keys, combination, strict=True)) | dict(fixed)) for combination in itertools.islice(self._combinations(), 200))

    def _fits(self, parameters: dict[str, Any]) -> bool:
        try:
            parse_train_config(self.with_values(parameters), self._name)
        except ConfigError:
            return False
        return True

    def _combinations(self) -> Iterator[tuple[Any, ...]]:
        samples = [one.samples() for one in self.keys.values()]
        if math.prod(map(len, samples)) <= _ALL:
            yield from itertools.product(*samples)
            return
        yield from itertools.islice(itertools.product(*((one[0], one[-1]) for one in samples)), _ALL // 2)
        draw = random.Random(0)
        for _ in range(_ALL // 2):
            yield tuple(draw.choice(one) for one in samples)


class Key:
    """A key that is searched, and its range: of whole numbers, of numbers, or of choices."""

    def __init__(self, name: str, found: RangeConfig) -> None:
        self.name, self.range = name, found
        self.whole = isinstance(found.low, int)

    def samples(self) -> list[Any]:
        """The values where there are few, else the ends of the range and some between: what the configuration's checks are tried on."""
        one = self.range
        if one.choices is not None:
            return one.choices
        assert one.low is not None and one.high is not None
        if self.whole:
            numbers = range(int(one.low), int(one.high) + 1, int(one.step or 1))
            return [*numbers] if len(numbers) <= _EACH else [*numbers[:2], *numbers[2:-2:len(numbers) // 8], *numbers[-2:]]
        return [one.low, math.sqrt(one.low * one.high) if one.log else (one.low + one.high) / 2, one.high]

    def names_of_choices(self) -> list[str | int | float | bool]:
        """The choices as a study can hold them: lists by their TOML."""
        assert self.range.choices is not None
        return [choice if isinstance(choice, (str, int, float, bool)) else toml_value(choice) for choice in self.range.choices]

    def value(self, stored: Any) -> Any:
        """What the configuration is given for a value that the study holds."""
        if self.range.choices is None:
            return stored
        return next(choice for choice, name in zip(self.range.choices, self.names_of_choices(), strict=True) if name == stored and type(name) is type(stored))


def _below(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _range(key: str, found: RangeConfig, fields: Mapping[str, FieldInfo], values: Mapping[str, Any], name: str) -> RangeConfig:
    """The range with numbers of the key's type."""
    below = [one for one in fields if one.startswith(f"{key}.")]
    if below:
        raise ConfigError(f"{name}: search.space has {key}, which is a table: name one of its keys, such as {below[0]}")
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
        last = [one for one in fields if one.split(".")[-1] == key.split(".")[-1]]
        hint = next(iter(last or near), None)
        raise ConfigError(f"{name}: search.space has {key}, which is no key of the configuration{f'; did you mean {hint}?' if hint else ''}")
    for refused, reason in _REFUSED.items():
        if _below(key, refused):
            raise ConfigError(f"{name}: search.space has {key}, which cannot be searched: {reason}")
    if key.split(".")[0] in ("teacher", "distillation") and "teacher" not in values:
        raise ConfigError(f"{name}: search.space has {key}, which does nothing without a teacher: add a table [teacher], or take the key out")
    if found.choices is not None:
        return found
    numbers = [value for value in (found.low, found.high, found.step) if value is not None]
    kinds = _types(fields[key].annotation)
    if float in kinds:
        return found.model_copy(update={side: float(value) for side in ("low", "high", "step") if (value := getattr(found, side)) is not None})
    if int not in kinds:
        raise ConfigError(f"{name}: search.space.{key}: the key holds no number, so it needs choices in place of low and high")
    if not all(isinstance(value, int) for value in numbers):
        raise ConfigError(f"{name}: search.space.{key}: the key holds a whole number, so low, high and step must be whole numbers")
    return found


def _types(annotation: Any) -> set[Any]:
    """The plain types that a key may hold."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _types(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*map(_types, typing.get_args(annotation)))
    return {annotation}
