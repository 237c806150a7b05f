"""A client that knows nothing but the address: grpcio's own reflection client lists, describes and calls the service."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from served import serving

from cvmk.inference import Translator
from cvmk.serving import messages


def test_list_describe_and_call(serve_config: Any) -> None:
    config = serve_config()
    expected = Translator(config.models["en-de"].path).translate(["a man rides"])[0].text

    def client(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert {messages.SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= set(database.get_services())
            assert messages.ADMIN not in database.get_services()  # that is at a port of its own
            service = descriptor_pool.DescriptorPool(database).FindServiceByName(messages.SERVICE)
            assert set(service.methods_by_name) == {"Translate", "TranslateStream", "Detect", "ListModels", "GetStats"}
            method = service.methods_by_name["Translate"]
            question, answer = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
            call = channel.unary_unary(
                f"/{service.full_name}/{method.name}", request_serializer=question.SerializeToString, response_deserializer=answer.FromString
            )
            found = json_format.MessageToDict(call(question(texts=[b"a man rides"], source="en")))
            assert found["model"] == "en-de"
            assert call(question(texts=[b"a man rides"])).translations[0].text.decode() == expected
            streaming = service.methods_by_name["TranslateStream"]
            event, update = (message_factory.GetMessageClass(kind) for kind in (streaming.input_type, streaming.output_type))
            talk = channel.stream_stream(
                f"/{service.full_name}/{streaming.name}", request_serializer=event.SerializeToString, response_deserializer=update.FromString
            )
            events = [event(), event(), event()]
            events[0].open.source, events[1].append.seq, events[1].append.text = "en", 1, b"a man rides"
            events[2].close.SetInParent()
            responses = list(talk(iter(events)))
            assert responses[0].opened.model == "en-de" and b"".join(one.committed_delta for one in responses).decode() == expected

    async def go() -> None:
        async with serving(config) as (server, _):
            await asyncio.to_thread(client, server.ports.grpc)

    asyncio.run(asyncio.wait_for(go(), 60))
