"""The messages of realtime_translation.proto as JSON objects, for whoever has no gRPC: fields by their names, text as text, values of enumerations as words.

It goes by the protocol's description, so that a field that is added there is here too. As in gRPC, a field that is left out, or null, has its default, which is
left out of what is written, and fields that nobody knows are ignored.
"""

from __future__ import annotations

import json
from typing import Any

from cvmk.serving import messages
from cvmk.serving.errors import ServiceError, Status, invalid

_UNSIGNED = {13: 32, 4: 64}  # bits by the numbers of FieldDescriptor.TYPE_UINT32 and TYPE_UINT64
_DOUBLE, _BOOL, _STRING, _MESSAGE, _BYTES, _ENUM = 1, 8, 9, 11, 12, 14


def object_of(text: str | None) -> dict[str, Any]:
    """The JSON object that a text is. Raises ServiceError."""
    try:
        data = json.loads(text or "")
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ServiceError(Status.INVALID_ARGUMENT, "the message is no JSON object")
    return data


def from_json(name: str, data: dict[str, Any]) -> Any:
    """The message `name` with the fields of an object. Raises ServiceError, which names the field. Text is not checked here: it is bytes, whatever they are."""
    message = getattr(messages, name)()
    _fill(message, data, "")
    return message


def to_json(message: Any) -> dict[str, Any]:
    """The object of a message."""
    return {field.name: [_value(field, one) for one in value] if _is_list(field) else _value(field, value) for field, value in message.ListFields()}


def _value(field: Any, value: Any) -> Any:
    if field.type == _MESSAGE:
        return to_json(value)
    if field.type == _BYTES:
        return value.decode("utf-8", "replace")
    return _word(field.enum_type, value) if field.type == _ENUM else value


def _fill(message: Any, data: object, path: str) -> None:
    if not isinstance(data, dict):
        raise invalid(path, "must be an object")
    for field in message.DESCRIPTOR.fields:
        value = data.get(field.name)
        if value is None:
            continue
        where = f"{path}.{field.name}" if path else field.name
        if (group := field.containing_oneof) is not None and (other := message.WhichOneof(group.name)) is not None:
            raise invalid(where, f"cannot be beside {other}: give one of them")
        if _is_list(field):
            if not isinstance(value, list):
                raise invalid(where, "must be a list")
            getattr(message, field.name).extend(_scalar(field, one, f"{where}[{place}]") for place, one in enumerate(value))
        elif field.type == _MESSAGE:
            part = getattr(message, field.name)
            part.SetInParent()
            _fill(part, value, where)
        else:
            setattr(message, field.name, _scalar(field, value, where))


def _scalar(field: Any, value: object, where: str) -> Any:
    if field.type in _UNSIGNED:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2 ** _UNSIGNED[field.type]:
            raise invalid(where, "must be a whole number that is not negative")
        return value
    if field.type == _BOOL:
        if not isinstance(value, bool):
            raise invalid(where, "must be true or false")
        return value
    if field.type == _DOUBLE:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(where, "must be a number")
        return float(value)
    if not isinstance(value, str):
        raise invalid(where, "must be a string")
    encoded = value.encode("utf-8", "surrogatepass")
    if field.type == _BYTES:
        return encoded
    if field.type == _ENUM:
        words = {_word(field.enum_type, known.number): known.number for known in field.enum_type.values}
        if value not in words:
            raise invalid(where, f"must be one of {', '.join(words)}")
        return words[value]
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise invalid(where, "has half of a surrogate pair")
    return value


def _is_list(field: Any) -> bool:
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)  # protobuf before 6.31 has no is_repeated


def _word(enum: Any, number: int) -> str:
    """A value's name without the enumeration's, as PRIORITY_HIGH is "high"."""
    known = enum.values_by_number.get(number)
    return "" if known is None else str(known.name).removeprefix(f"{enum.name.upper()}_").lower()
