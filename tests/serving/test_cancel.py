"""Who does not wait any more costs nothing any more: calls that are cancelled, that are late, and clients that vanish."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from served import append, ask, idle, request, serving, stream, until

from cvmk.inference import Translator
from cvmk.serving import messages
from cvmk.serving import server as server_module

CODES = grpc.StatusCode
LONG = "ride a horse and two men ride a horse"


def run(coroutine: Any, seconds: float = 100) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


class Steps:
    """The steps of a server's engine: counted, each as slow as it is said."""

    def __init__(self, server: Any, seconds: float = 0.0) -> None:
        (served,) = server.application.catalogue
        self.engine, self.count, self.seconds = served.translator.engine, 0, seconds
        self._step = self.engine.step
        self.engine.step = self._counted

    def _counted(self) -> Any:
        self.count += 1
        time.sleep(self.seconds)
        return self._step()


async def words(text: str, pause: float, closes: bool = True, **fields: Any) -> Any:
    """Requests of a stream that is told a text word by word."""
    yield request(open=messages.Open(source="en", credit=64, **fields))
    for index, word in enumerate(text.split(" ")):
        yield append(index + 1, f"{word} ")
        await asyncio.sleep(pause)
    if closes:
        yield request(close=messages.Close())
    else:
        await asyncio.Event().wait()


def test_a_cancelled_call_is_out_of_the_engine_within_a_step(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config(model={"max_length": 400})) as (server, channel):
            steps = Steps(server, 0.02)
            held = steps.engine.held_bytes()
            for ask_for in ("Translate", "TranslateStream"):
                before = steps.count
                if ask_for == "Translate":
                    call = asyncio.ensure_future(ask(channel, "Translate", messages.TranslateRequest(texts=[(LONG * 8).encode()], source="en")))
                else:
                    call = stream(channel, request_iterator=words(LONG * 8, 0, closes=False))
                await until(lambda before=before: steps.count > before + 3)  # type: ignore[misc]
                call.cancel()
                await until(lambda: idle(server))
                at = steps.count
                await asyncio.sleep(0.2)
                assert steps.count - at <= 1
            assert await ask(channel, "Translate", messages.TranslateRequest(texts=[b"a man"]))
            steps.seconds = 0
            await check_memory(steps.engine, held)

    run(go())


async def check_memory(engine: Any, held: int) -> None:
    """What threads work in is given back when they have been idle."""
    for _ in range(300):
        await asyncio.to_thread(engine.step)
    assert engine.held_bytes() <= held


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.exhaustive)])
def test_half_of_the_calls_are_cancelled_at_some_moment(serve_config: Any, count: int) -> None:
    config = serve_config(model={"max_length": 100}, limits={"sessions_per_client": 64})
    texts = ["a man rides", "two horses", LONG, "Ride. A man. A horse."]
    translator = Translator(config.models["en-de"].path)
    expected = dict(zip(texts[:3], (one.text for one in translator.translate(texts[:3])), strict=True))
    expected[texts[3]] = " ".join(one.text for one in translator.translate(["Ride.", "A man.", "A horse."]))
    generator = random.Random(0)

    async def whole(channel: Any, text: str) -> str:
        found = await ask(channel, "Translate", messages.TranslateRequest(texts=[text.encode()], source="en"))
        return str(found.translations[0].text.decode())

    async def streamed(channel: Any, text: str) -> str:
        parts: dict[int, str] = {}
        call = stream(channel, request_iterator=words(text, generator.random() * 0.002))
        try:
            async for response in call:
                parts[response.segment] = parts.get(response.segment, "") + response.committed_delta.decode()
        finally:
            call.cancel()
        return " ".join(part for _, part in sorted(parts.items()) if part)

    async def one(channel: Any, places: asyncio.Semaphore) -> bool:
        async with places:
            text = generator.choice(texts)
            task = asyncio.ensure_future(generator.choice((whole, streamed))(channel, text))
            if generator.random() < 0.5:
                await asyncio.sleep(generator.random() * 0.03)
                task.cancel()
            await asyncio.wait({task})
            if task.cancelled():
                return False
            assert task.result() == expected[text]
            return True

    async def go() -> None:
        async with serving(config) as (server, channel):
            steps = Steps(server, 0.001)
            held, places = steps.engine.held_bytes(), asyncio.Semaphore(32)
            done = await asyncio.gather(*(one(channel, places) for _ in range(count)))
            assert count // 3 < sum(done) < count
            await until(lambda: idle(server))
            at = steps.count
            await asyncio.sleep(0.1)
            assert steps.count - at <= 1 and not steps.engine._requests and not steps.engine._sources
            await check_memory(steps.engine, held)

    run(go())


def test_deadlines(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config(model={"max_length": 400})) as (server, channel):
            steps = Steps(server, 0.02)
            for seconds in (0.005, 0.02, 0.05, 0.2):
                begun, before = time.monotonic(), steps.count
                message = messages.TranslateRequest(texts=[(LONG * 8).encode()], source="en")
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await ask(channel, "Translate", message, timeout=seconds)
                assert error.value.code() is CODES.DEADLINE_EXCEEDED and time.monotonic() - begun < seconds + 1
                await until(lambda: idle(server))
                assert steps.count - before <= seconds / 0.02 + 3  # the steps behind it were saved
        async with serving(serve_config(model={"max_length": 400}, limits={"request_seconds": 0.1})) as (server, channel):  # those that bring none
            steps = Steps(server, 0.02)
            with pytest.raises(grpc.aio.AioRpcError, match="not ready in time") as error:
                await ask(channel, "Translate", message)
            assert error.value.code() is CODES.DEADLINE_EXCEEDED and steps.count < 10 and idle(server)

    run(go())


CLIENT = """
import asyncio, sys
import grpc.aio
from cvmk.serving import messages

async def one(channel):
    async def requests():
        yield messages.StreamRequest(open=messages.Open(source="en"))
        for seq in range(1, 10**6):
            yield messages.StreamRequest(append=messages.Append(seq=seq, text=b"a man rides "))
            await asyncio.sleep(0.02)
    call = channel.stream_stream(f"/{messages.SERVICE}/TranslateStream", request_serializer=lambda one: one.SerializeToString())
    async for _ in call(requests()):
        pass

async def main():
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        await asyncio.gather(*(one(channel) for _ in range(10)))

asyncio.run(main())
"""


def test_clients_that_are_killed(serve_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        async with serving(serve_config()) as (server, channel):
            path = os.pathsep.join(folder for folder in sys.path if folder)
            command = [sys.executable, "-c", CLIENT, f"127.0.0.1:{server.ports.grpc}"]
            client = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL)
            try:
                await until(lambda: server.application.stats().sessions == 10, 60)
                await asyncio.sleep(0.1)
            finally:
                client.send_signal(signal.SIGKILL)
                client.wait()
            await until(lambda: idle(server), 10)
            assert await ask(channel, "Translate", messages.TranslateRequest(texts=[b"a man"]))
        assert len([record for record in caplog.records if record.name.startswith("cvmk")]) <= 15 and "Traceback" not in caplog.text

    run(go())


class Proxy:
    """Between client and server, until it forwards nothing any more and tells nobody."""

    def __init__(self, port: int) -> None:
        self._port, self.silent = port, False
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", self._port)
        for pair in ((reader, there[1]), (there[0], writer)):
            self._tasks.add(asyncio.create_task(self._forward(*pair)))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if not self.silent:
                    writer.write(data)
                    await writer.drain()


@pytest.mark.parametrize(("every", "wait"), [(1000, 1000), pytest.param(None, None, marks=pytest.mark.exhaustive)], ids=["seconds", "as it is"])
def test_a_network_that_forwards_nothing_any_more(serve_config: Any, monkeypatch: pytest.MonkeyPatch, every: int | None, wait: int | None) -> None:
    options = dict(server_module._OPTIONS)
    if every is not None and wait is not None:
        options |= {"grpc.keepalive_time_ms": every, "grpc.keepalive_timeout_ms": wait, "grpc.http2.ping_timeout_ms": wait}
        options["grpc.http2.min_ping_interval_without_data_ms"] = every // 2  # else the second ping waits for it
        monkeypatch.setattr(server_module, "_OPTIONS", list(options.items()))
    allowed = (options["grpc.keepalive_time_ms"] + options["grpc.keepalive_timeout_ms"]) / 1000

    async def go() -> None:
        async with serving(serve_config()) as (server, channel), Proxy(server.ports.grpc) as proxy:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}") as far:
                calls = [stream(far, request_iterator=words("a man rides", 0.01, closes=False)) for _ in range(5)]
                for call in calls:
                    await call.read()
                await until(lambda: server.application.stats().sessions == 5)
                proxy.silent = True
                assert await until(lambda: idle(server), allowed + 20) < allowed + 5
                assert await ask(channel, "Translate", messages.TranslateRequest(texts=[b"a man"]))
                for call in calls:
                    call.cancel()

    run(go())
