"""What one call of an op holds: a NamedTuple of its tensors and options, from which the schemas of its passes are made.

An op module writes `class Call(NamedTuple)`, tensors first, and `class Out(NamedTuple)`, the results of the forward pass. They are the only
list of the op's arguments: schemas are derived from their annotations, backends take them whole.
"""

from __future__ import annotations

import operator
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

Written = Annotated[Tensor, "a!"]
"""Annotation of a tensor that the forward pass writes to."""

Needs = Any
"""A NamedTuple of bools, one a differentiable argument of the op, under its name: whether its gradient is wanted."""

_Fields = TypeVar("_Fields")


class _Make(Protocol):
    def __call__(self, kind: type[_Fields], fields: Iterable[Any], /) -> _Fields: ...


make = cast(_Make, tuple.__new__)
"""A `Call`, `Out` or `Needs` of a tuple of all its fields: a third of the time that the NamedTuple's own constructor takes."""

_SCALARS = {float: "float", int: "int", bool: "bool", str: "str", torch.dtype: "ScalarType", list[bool]: "bool[]", Tensor: "Tensor"}


class Fields(NamedTuple):
    """The names of a call's fields, how many leading ones are tensors, which of these are written to, and the declarations of all."""

    names: tuple[str, ...]
    tensors: int
    written: tuple[int, ...]
    declared: tuple[str, ...]


def fields_of(call: type) -> Fields:
    """The fields of a `Call`. Raises TypeError for an annotation that no schema has, and for a tensor behind an option."""
    hints = typing.get_type_hints(call, include_extras=True)
    kinds = [_declared(call, name, hint) for name, hint in hints.items()]
    tensors = sum(kind.startswith("Tensor") for kind in kinds)
    if any(kind.startswith("Tensor") for kind in kinds[tensors:]):
        raise TypeError(f"{call.__module__}.{call.__qualname__}: tensors come before the other fields")
    written = tuple(i for i, kind in enumerate(kinds) if "!" in kind)
    return Fields(tuple(hints), tensors, written, tuple(f"{kind} {name}" for kind, name in zip(kinds, hints, strict=True)))


def _declared(call: type, name: str, hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        _, mark = typing.get_args(hint)
        return f"Tensor({mark})"
    options = [option for option in typing.get_args(hint) if option is not type(None)] if hint not in _SCALARS else []
    base = options[0] if len(options) == 1 else hint
    if base not in _SCALARS:
        raise TypeError(f"{call.__module__}.{call.__qualname__}.{name} is {hint}, which no schema has")
    return _SCALARS[base] + ("?" if base is not hint else "")


def picked(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that makes a tuple of what stands at these places of a sequence."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    if not places:
        return lambda values: ()
    (at,) = places
    return lambda values: (values[at],)


def written(call: type, name: str, field: str) -> Any:
    """The type `call` under another name, whose tensor `field` is written to."""
    hints = typing.get_type_hints(call, include_extras=True)
    made = NamedTuple(name, [(key, Written if key == field else hint) for key, hint in hints.items()])  # type: ignore[misc]
    made.__module__ = call.__module__
    return made


def number(name: str, value: Any) -> float:
    """An option as a float. Raises TypeError for a tensor that asks for a gradient, which an option cannot give."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} is a tensor that asks for a gradient, and it is an option without one: multiply it into an argument, or give {name}.item()")
    return float(value)


def integer(name: str, value: Any) -> int:
    """An option as an integer of 64 bits. Raises TypeError for what is none, ValueError for one that needs more."""
    whole: int = value
    if value.__class__ is not int:
        try:
            whole = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not -(2**63) <= whole < 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {whole}")
    return whole
