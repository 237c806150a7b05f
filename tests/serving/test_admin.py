"""Administrators load, unload and drain; nobody else does."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import ask, refused, serving

from cvmk.serving import messages
from cvmk.serving.server import STUCK

CODES = grpc.StatusCode
TOKEN = (("authorization", "Bearer an-administrators-token"),)


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def healthy(channel: Any, name: str) -> bool:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_an_engine_that_is_stuck_is_not_well(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config()) as (server, channel):
            assert await healthy(channel, "en-de") and await healthy(channel, "")
            served = next(iter(server.application.catalogue))
            held, step = threading.Event(), served.translator.engine.step
            served.translator.engine.step = lambda: held.wait(30) and step()  # type: ignore[method-assign]
            asking = asyncio.create_task(ask(channel, "Translate", messages.TranslateRequest(texts=[b"a man"])))
            while not served.stuck_seconds():
                await asyncio.sleep(0.01)
            served.stuck_seconds = lambda: STUCK + 1  # type: ignore[method-assign]
            await server.publish_health()
            assert not await healthy(channel, "en-de") and not await healthy(channel, "") and not await healthy(channel, messages.SERVICE)
            del served.stuck_seconds
            held.set()
            await asking
            await server.publish_health()
            assert await healthy(channel, "en-de") and await healthy(channel, "")

    run(go())


@pytest.fixture
def config(serve_config: Any, tmp_path: Path) -> Any:
    keys = tmp_path / "admins"
    keys.write_text("root = an-administrators-token\n")
    keys.chmod(0o600)
    return serve_config((("en", "de"), ("de", "en")), server={"admin_port": 0}, security={"admin_keys": str(keys)})


def test_administrators(config: Any, tmp_path: Path) -> None:
    async def go() -> None:
        async with serving(config) as (server, main), grpc.aio.insecure_channel(f"127.0.0.1:{server.ports.admin}") as channel:

            async def admin(method: str, metadata: Any = TOKEN, **fields: Any) -> Any:
                return await ask(channel, method, getattr(messages, f"{method}Request")(**fields), service=messages.ADMIN, metadata=metadata)

            code, _ = await refused(admin("Unload", metadata=None, model="en-de"))
            assert code is CODES.UNAUTHENTICATED
            code, said = await refused(admin("Unload", metadata=(("authorization", "Bearer wrong-wrong-wrong"),), model="en-de"))
            assert code is CODES.PERMISSION_DENIED and "wrong-wrong" not in said
            code, _ = await refused(ask(main, "Load", messages.LoadRequest(model="en-de"), service=messages.ADMIN, metadata=TOKEN))
            assert code is CODES.UNIMPLEMENTED  # not at the port that everybody reaches

            loaded = (await admin("Load", model="en-de", path=config.models["en-de"].path)).model
            assert loaded.name == "en-de" and loaded.version == (await ask(main, "ListModels")).models[0].version
            code, said = await refused(admin("Load", model="en-de", path=config.models["de-en"].path))
            assert code is CODES.FAILED_PRECONDITION and "translates de to en" in said
            assert (await refused(admin("Load", model="en-de", path=str(tmp_path / "nothing"))))[0] is CODES.FAILED_PRECONDITION
            assert (await refused(admin("Load", model="fr-de")))[0] is CODES.NOT_FOUND
            assert {one.name: one.version for one in (await ask(main, "ListModels")).models}["en-de"] == loaded.version

            await admin("Unload", model="en-de")
            assert [one.name for one in (await ask(main, "ListModels")).models] == ["de-en"]
            assert (await refused(ask(main, "Translate", messages.TranslateRequest(texts=[b"a"], source="en"))))[0] is CODES.NOT_FOUND
            await server.publish_health()
            assert [await healthy(main, name) for name in ("en-de", "de-en", "")] == [False, True, True]
            assert (await refused(admin("Unload", model="en-de")))[0] is CODES.NOT_FOUND
            assert (await refused(admin("Unload", model="de-en")))[0] is CODES.FAILED_PRECONDITION
            await admin("Load", model="en-de")
            await ask(main, "Translate", messages.TranslateRequest(texts=[b"a"], source="en"))

            assert (await refused(admin("Drain", seconds=10_000)))[0] is CODES.INVALID_ARGUMENT
            serve = asyncio.create_task(server.serve())
            await admin("Drain", seconds=1)
            await serve
            assert (await refused(ask(main, "Translate", messages.TranslateRequest(texts=[b"a"], source="en"))))[0] is CODES.UNAVAILABLE

    run(go())
