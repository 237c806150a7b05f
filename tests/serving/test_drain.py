"""A server that is told to end: nobody new is taken, what runs is finished, and it is gone in time."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import append, ask, refused, request, stream
from server_process import ServerProcess

from cvmk.inference import Translator
from cvmk.serving import messages
from cvmk.serving.application import Application
from cvmk.serving.auth import Caller
from cvmk.serving.errors import ServiceError
from cvmk.serving.whole_texts import translate_whole

CODES = grpc.StatusCode
LONG = "ride a horse and two men ride a horse " * 6
SLOW = """
import time
from cvmk.inference.native_engine import NativeEngine
step = NativeEngine.step
NativeEngine.step = lambda self: (time.sleep(0.02), step(self))[1]
"""


def run(coroutine: Any, seconds: float = 100) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


def tables(config: Any, **others: Any) -> dict[str, Any]:
    return {"models": {name: {"path": model.path, "threads": 1} for name, model in config.models.items()}, **others}


def translated(channel: Any, text: str, **options: Any) -> Any:
    return asyncio.ensure_future(ask(channel, "Translate", messages.TranslateRequest(texts=[text.encode()], source="en"), **options))


def check_log(server: ServerProcess) -> None:
    """Nothing failed, nor does grpc say so of calls that the end has cancelled."""
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    assert lines and not [line for line in lines if line["level"] == "error"] and "Traceback" not in server.log, server.log


async def finished(server: ServerProcess, seconds: float) -> int:
    return await asyncio.to_thread(server.ended, seconds)


def test_what_runs_is_finished(serve_config: Any) -> None:
    config = serve_config(model={"max_length": 300})
    expected = [one.text for one in Translator(config.models["en-de"].path).translate([LONG.strip(), "a man rides"])]

    async def go(server: ServerProcess) -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="en-de"))
            assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
            idle = stream(channel)
            await idle.write(request(open=messages.Open(source="en")))
            assert (await idle.read()).opened.session
            speaking = stream(channel)
            await speaking.write(request(open=messages.Open(source="en")))
            assert (await speaking.read()).opened.session
            running = translated(channel, LONG)
            await asyncio.sleep(0.1)
            await speaking.write(append(1, "a man rides"))
            await speaking.write(request(end_segment=messages.EndSegment()))  # has come, and is to be said
            await asyncio.sleep(0.02)
            begun = time.monotonic()
            server.tell(signal.SIGTERM)
            assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert time.monotonic() - begun < 0.5 and not running.done()
            code, said = await refused(translated(channel, "a man"))
            assert code is CODES.UNAVAILABLE and "draining" in said
            late = stream(channel)
            await late.write(request(open=messages.Open(source="en")))
            assert (await refused(late.read()))[0] is CODES.UNAVAILABLE
            assert (await refused(idle.read()))[0] is CODES.UNAVAILABLE
            said = ""
            with pytest.raises(grpc.aio.AioRpcError) as error:
                while True:
                    said += (await speaking.read()).committed_delta.decode()
            assert error.value.code() is CODES.UNAVAILABLE and said == expected[1]
            assert (await running).translations[0].text.decode().strip() == expected[0]
            assert await finished(server, 30) == 0

    with ServerProcess(tables(config), SLOW) as server:
        run(go(server))
        check_log(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)])
def test_the_second_time_it_ends_at_once(serve_config: Any, number: int) -> None:
    async def go(server: ServerProcess) -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            running = translated(channel, LONG)
            opened = stream(channel)
            await opened.write(request(open=messages.Open(source="en")))
            await opened.read()
            await opened.write(append(1, LONG))
            await asyncio.sleep(0.1)
            server.tell(number)
            with pytest.raises(subprocess.TimeoutExpired):
                await finished(server, 0.3)
            begun = time.monotonic()
            server.tell(number)
            assert await finished(server, 20) == 0 and time.monotonic() - begun < 4
            for call in (running, opened.read()):
                assert (await refused(call))[0] is CODES.UNAVAILABLE

    with ServerProcess(tables(serve_config(model={"max_length": 300})), SLOW.replace("0.02", "0.1")) as server:
        run(go(server))
        check_log(server)


def test_what_takes_too_long_is_ended(serve_config: Any) -> None:
    async def go(server: ServerProcess) -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            running = translated(channel, LONG)
            await asyncio.sleep(0.1)
            server.tell()
            assert await finished(server, 10) == 0
            assert (await refused(running))[0] is CODES.UNAVAILABLE

    with ServerProcess(tables(serve_config(model={"max_length": 300}), server={"drain_seconds": 0.5}), SLOW.replace("0.02", "0.2")) as server:
        run(go(server))
        check_log(server)


def test_a_document_that_has_begun_gets_all_its_rounds(serve_config: Any) -> None:
    async def go() -> None:
        application, rounds = Application(serve_config()), 0
        await application.start()
        translate = application.translate

        async def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal rounds, drained
            rounds += 1
            found = await translate(*arguments, **options)
            if drained is None:
                drained = asyncio.create_task(application.drain(20))
                await asyncio.sleep(0)
            assert application.draining and not drained.done()
            return found

        drained: asyncio.Task[None] | None = None
        application.translate = counted  # type: ignore[method-assign]
        caller, wanted = Caller("peer:test"), {"source": "en", "target": "de", "is_html": True}
        (found,) = await translate_whole(application, caller, ["<p>A man <code>x</code> rides a horse</p>"], **wanted)  # type: ignore[arg-type]
        assert rounds > 1 and "<code>x</code>" in found.text and drained is not None
        await drained
        with pytest.raises(ServiceError, match="draining"):
            await translate_whole(application, caller, ["<p>A man</p>"], **wanted)  # type: ignore[arg-type]
        await application.stop()

    run(go())


def test_a_server_on_the_native_engine_has_no_torch(serve_config: Any) -> None:
    """In any of its libraries, also after it has translated and found out a language."""

    async def go(server: ServerProcess) -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            await ask(channel, "Translate", messages.TranslateRequest(texts=[b"a man rides a horse"]))

    with ServerProcess(tables(serve_config())) as server:
        run(go(server))
        with open(f"/proc/{server.pid}/maps") as maps:
            assert "torch" not in maps.read()
        server.tell()
        assert server.ended(20) == 0
