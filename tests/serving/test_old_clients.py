"""Clients and servers that were built from an older realtime_translation.proto go on working with the present one."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from fake_server import FakeServer
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from cvmk.serving import messages

FROZEN = Path(__file__).resolve().parents[1] / "resources" / "realtime_translation_v1.txt"
"""The protocol as the first clients know it, a line a field: message, number, type, name. Lines are only ever added, to a file of another name."""
Field = descriptor_pb2.FieldDescriptorProto
TYPES = {name.removeprefix("TYPE_").lower(): number for name, number in Field.Type.items()}


def old_protocol() -> descriptor_pb2.FileDescriptorProto:
    """The frozen descriptor."""
    file = descriptor_pb2.FileDescriptorProto(name="old/realtime_translation.proto", package=messages.PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for line in FROZEN.read_text(encoding="ascii").splitlines():
        match line.split():
            case ["rpc", service, name, *kinds]:
                where = made[service] if service in made else made.setdefault(service, file.service.add(name=service))
                plain = [f".{messages.PACKAGE}.{kind}" for kind in kinds if kind != "stream"]
                streams = [i > 0 and kinds[i - 1] == "stream" for i, kind in enumerate(kinds) if kind != "stream"]
                where.method.add(name=name, input_type=plain[0], output_type=plain[1], client_streaming=streams[0], server_streaming=streams[1])
            case ["enum", enum, number, name]:
                where = made[enum] if enum in made else made.setdefault(enum, file.enum_type.add(name=enum))
                where.value.add(name=name, number=int(number))
            case [message, *field]:
                where = made[message] if message in made else made.setdefault(message, file.message_type.add(name=message))
                if field:
                    _add_field(where, *field)
    enums = {enum.name for enum in file.enum_type}
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type = Field.TYPE_ENUM if field.type_name.rpartition(".")[2] in enums else Field.TYPE_MESSAGE
    return file


def _add_field(message: Any, number: str, *rest: str) -> None:
    words = list(rest)
    oneof = words.pop(0) if words[0].startswith("oneof:") else ""
    label = words.pop(0) if words[0] in ("repeated", "optional") else ""
    kind, name = words
    field = message.field.add(name=name, number=int(number), label=Field.LABEL_REPEATED if label == "repeated" else Field.LABEL_OPTIONAL)
    if kind in TYPES:
        field.type = TYPES[kind]
    else:
        field.type_name = f".{messages.PACKAGE}.{kind}"
    group = oneof.removeprefix("oneof:") or (f"_{name}" if label == "optional" else "")
    if group:
        names = [each.name for each in message.oneof_decl]
        if group not in names:
            message.oneof_decl.add(name=group)
            names.append(group)
        field.oneof_index, field.proto3_optional = names.index(group), label == "optional"


@pytest.fixture(scope="module")
def old() -> dict[str, Any]:
    """Its classes."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(old_protocol())
    found = pool.FindFileByName("old/realtime_translation.proto")
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.message_types_by_name.items()}


def described(field: Any) -> tuple[Any, ...]:
    """What must not change of a field."""
    kind = field.message_type or field.enum_type
    oneof = field.containing_oneof
    return field.number, field.type, field.is_repeated, field.has_presence, kind and kind.full_name, oneof and oneof.name, field.json_name


def test_no_name_or_number_has_changed(old: dict[str, Any]) -> None:
    for name, message in old.items():
        now = getattr(messages, name).DESCRIPTOR
        for field in message.DESCRIPTOR.fields:
            assert field.name in now.fields_by_name, f"{name}.{field.name} is gone, which old clients send or read: bring it back"
            assert described(now.fields_by_name[field.name]) == described(field), f"{name}.{field.name} is not what old clients take it for"
    frozen = old_protocol()
    for enum in frozen.enum_type:
        for value in enum.value:
            assert messages.FILE.enum_types_by_name[enum.name].values_by_name[value.name].number == value.number
    for service in frozen.service:
        methods = messages.services()[f"{messages.PACKAGE}.{service.name}"]
        for method in service.method:
            now = methods[method.name]
            assert (now.input_type.name, now.output_type.name) == (method.input_type.rpartition(".")[2], method.output_type.rpartition(".")[2])
            assert (now.client_streaming, now.server_streaming) == (method.client_streaming, method.server_streaming)


def filled(message: Any, chances: random.Random, depth: int = 0) -> Any:
    """The message with something in most fields."""
    for field in message.DESCRIPTOR.fields:
        for _ in range(chances.randint(1, 2) if field.is_repeated else chances.random() < 0.8):
            if field.message_type is not None:
                if depth < 4:
                    part = getattr(message, field.name)
                    filled(part.add() if field.is_repeated else part, chances, depth + 1)
                    if not field.is_repeated:
                        part.SetInParent()
                continue
            values: dict[int, Any] = {
                field.TYPE_BYTES: chances.randbytes(5), field.TYPE_STRING: f"ü{chances.random()}", field.TYPE_BOOL: True, field.TYPE_DOUBLE: chances.random(),
                field.TYPE_ENUM: 2,
            }  # fmt: skip
            value = values.get(field.type, chances.randint(1, 2**31))
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
    return message


def test_old_and_present_messages_read_each_other(old: dict[str, Any]) -> None:
    chances = random.Random(0)
    for name, message in old.items():
        for _ in range(20):
            sent = filled(message(), chances)
            now = getattr(messages, name).FromString(sent.SerializeToString())
            for field, value in sent.ListFields():
                if field.message_type is None:
                    assert getattr(now, field.name) == value
            assert message.FromString(now.SerializeToString()) == sent
            new = filled(getattr(messages, name)(), chances)  # with fields that the old one may not know
            assert getattr(messages, name).FromString(message.FromString(new.SerializeToString()).SerializeToString()) == new


def test_an_old_client_has_its_text_translated(old: dict[str, Any]) -> None:
    async def work() -> list[bytes]:
        async with FakeServer() as server, grpc.aio.insecure_channel(server.address) as channel:
            call = channel.stream_stream(
                f"/{messages.SERVICE}/TranslateStream",
                request_serializer=old["StreamRequest"].SerializeToString,
                response_deserializer=old["StreamResponse"].FromString,
            )()
            request = old["StreamRequest"]
            await call.write(request(open=old["Open"](source="en", target="de")))
            await call.write(request(append=old["Append"](seq=1, text=b"one two. three")))
            await call.write(request(close=old["Close"]()))
            return [response.committed_delta async for response in call if response.final]

    assert asyncio.run(work()) == [b"ONE TWO.", b"THREE"]
