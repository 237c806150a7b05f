"""A server that has worked for long has as much memory and as many open files as before; and what keeps a little of every request is found out."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from served import append, ask, request, stream
from server_process import ServerProcess

from cvmk.serving import messages

LEAK = """
from cvmk.serving.application import Application
translate, kept = Application.translate, []
async def leaking(self, *given, **named):
    kept.append(bytearray({size}))
    return await translate(self, *given, **named)
Application.translate = leaking
"""
TEXTS = [b"a man rides", b"two horses", b"ride a man. A horse rides two men."]


def run(coroutine: Any, seconds: float = 600) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


def server_of(config: Any, before: str = "") -> ServerProcess:
    models = {name: {"path": model.path, "threads": 1} for name, model in config.models.items()}
    return ServerProcess({"models": models, "limits": {"sessions_per_client": 64}}, "from soak import without_huge_pages\nwithout_huge_pages()\n" + before)


async def requests(channel: Any, count: int) -> None:
    """So many, 16 at a time; some are cancelled, some are wrong, some come in streams."""

    async def some(first: int) -> None:
        for index in range(first, count, 16):
            text = TEXTS[index % len(TEXTS)]
            call = ask(channel, "Translate", messages.TranslateRequest(texts=[text], source="en", target="fr" if index % 50 == 1 else ""))
            task = asyncio.ensure_future(call)
            if index % 20 == 7:
                await asyncio.sleep(0.0005)
                task.cancel()
            await asyncio.wait({task})
            assert task.cancelled() or task.exception() is None or index % 50 == 1

    await asyncio.gather(*(some(first) for first in range(16)))


async def streams(channel: Any, count: int, together: int = 32) -> None:
    """So many, each of which opens, says a sentence, and closes."""

    async def some(first: int) -> None:
        for index in range(first, count, together):
            call = stream(channel)
            await call.write(request(open=messages.Open(source="en")))
            await call.write(append(1, TEXTS[index % len(TEXTS)]))
            await call.write(request(close=messages.Close()))
            final = False
            while (response := await call.read()) is not grpc.aio.EOF:
                final = response.final
            assert final

    await asyncio.gather(*(some(first) for first in range(together)))


async def growth(server: ServerProcess, count: int) -> float:
    """Bytes of memory for each of so many requests, after as many to warm up."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        await requests(channel, max(count // 2, 500))
        before = server.own_bytes()
        await requests(channel, count)
        return (server.own_bytes() - before) / count


@pytest.mark.parametrize(
    ("count", "leak", "allowed"), [(3000, 8192, 2048), pytest.param(60_000, 1024, 262, marks=[pytest.mark.exhaustive, pytest.mark.timeout(600)])]
)
def test_requests_keep_nothing(serve_config: Any, count: int, leak: int, allowed: float) -> None:
    """262 bytes a request are 50 MB in 200,000."""
    config = serve_config()
    with server_of(config) as server:
        assert run(growth(server, count)) < allowed
    with server_of(config, LEAK.format(size=leak)) as server:  # what the test must find
        assert run(growth(server, min(count, 10_000))) > allowed


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=[pytest.mark.exhaustive, pytest.mark.timeout(600)])])
def test_streams_that_come_and_go(serve_config: Any, count: int) -> None:
    async def go(server: ServerProcess) -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            await streams(channel, count // 4)
            memory, files = server.own_bytes(), server.descriptors()
            await streams(channel, count, 64)
            assert server.own_bytes() - memory < 20 << 20
            stats = await ask(channel, "GetStats")
            assert (stats.sessions, stats.waiting_tokens, stats.running_tokens, stats.rejected) == (0, 0, 0, 0)
            assert server.descriptors() <= files
            for _ in range(30):  # connections, too, give theirs back
                async with grpc.aio.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as another:
                    await streams(another, 2, 2)
            for _ in range(500):
                if server.descriptors() <= files:
                    break
                await asyncio.sleep(0.01)
            assert server.descriptors() <= files

    with server_of(serve_config()) as server:
        run(go(server))
