"""The client with the real service, over small models of random weights."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from served import serving

from cvmk.inference import Translator
from cvmk.serving import AsyncClient, Retry
from cvmk.serving.errors import ServiceError, Status
from cvmk.streaming import LocalAgreement, Retranslation, WaitK

SENTENCES = ["A man rides a horse.", "Two horses ride a man!", "A horse", "Man rides two men and a horse."]
TEXT = f"{SENTENCES[0]} {SENTENCES[1]}\n{SENTENCES[2]}\n{SENTENCES[3]}"


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def committed(client: AsyncClient, text: str, pause: float = 0.0, **options: Any) -> list[str]:
    """The committed text of each sentence, of a text that comes by words."""
    found: dict[int, str] = {}
    async with client.stream(**options) as stream:

        async def write() -> None:
            for word in text.split(" "):
                await stream.append(word + " ")
                await asyncio.sleep(pause)
            await stream.close()

        writer = asyncio.create_task(write())
        revision = 0
        async for update in stream:
            assert update.revision == revision + 1 and update.source_read <= len(text) + 1
            revision = update.revision
            found[update.segment] = found.get(update.segment, "") + update.committed
        await writer
    return [found[segment] for segment in sorted(found)]


def test_a_text_by_words(serve_config: Any) -> None:
    config = serve_config()
    translator = Translator(config.models["en-de"].path)
    expected = [one.text for one in translator.translate(SENTENCES)]

    async def go() -> None:
        async with serving(config) as (server, channel):
            async with AsyncClient(f"127.0.0.1:{server.ports.grpc}") as client:
                for policy in (None, Retranslation(0), "retranslation"):
                    assert await committed(client, TEXT, 0.001, policy=policy) == expected
                for policy in (LocalAgreement(2), WaitK(2)):
                    assert len(await committed(client, TEXT, 0.001, policy=policy, beam_size=2)) == len(SENTENCES)
                assert [one.text for one in await client.translate(SENTENCES, target="de")] == expected
                assert (await client.models())[0].name == "en-de" and (await client.stats()).sessions == 0
                assert (await client.detect("A man rides a horse"))[0].code == "en"
                with pytest.raises(ServiceError, match="source|language|zz") as caught:
                    async with client.stream(source="zz"):
                        pass
                assert caught.value.status in (Status.NOT_FOUND, Status.INVALID_ARGUMENT)
                async with client.stream() as stream:
                    await stream.append("text\0")
                    with pytest.raises(ServiceError) as caught:
                        await anext(stream)
                    assert caught.value.status is Status.INVALID_ARGUMENT

    run(go())


def test_a_text_that_is_corrected_while_it_is_typed(serve_config: Any) -> None:
    """Letter by letter, with wrong letters that are taken back, some when the sentence before has just ended."""
    config = serve_config()
    expected = [one.text for one in Translator(config.models["en-de"].path).translate(SENTENCES)]

    async def go(seed: int) -> None:
        chances = random.Random(seed)
        async with serving(config) as (server, channel), AsyncClient(f"127.0.0.1:{server.ports.grpc}") as client:
            async with client.stream(source="en", partial_words=seed % 2 == 1) as stream:
                place = 0
                for letter in TEXT:
                    if chances.random() < 0.15 and stream.begin <= place:
                        await stream.append(chances.choice(["x", "ho rs", "wrong "]))
                        await asyncio.sleep(chances.choice([0, 0.001, 0.005]))
                        await stream.replace(place, letter)
                    else:
                        await stream.append(letter)
                    place += 1
                    await asyncio.sleep(chances.choice([0, 0, 0, 0.001]))
                await stream.close()
                found: dict[int, str] = {}
                async for update in stream:
                    found[update.segment] = found.get(update.segment, "") + update.committed
        assert list(found.values()) == expected

    for seed in range(4):
        run(go(seed))


def test_keys(serve_config: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("me = 0123456789abcdef\n", encoding="utf-8")
    (tmp_path / "keys").chmod(0o600)
    config = serve_config(security={"keys": str(tmp_path / "keys")})

    async def go() -> None:
        async with serving(config) as (server, channel):
            for token, status in ((None, Status.UNAUTHENTICATED), ("fedcba9876543210", Status.PERMISSION_DENIED), ("0123456789abcdef", None)):
                async with AsyncClient(f"127.0.0.1:{server.ports.grpc}", token=token) as client:
                    for work in (lambda client: client.translate("a man"), lambda client: committed(client, "a man")):
                        try:
                            assert await work(client) and status is None
                        except ServiceError as error:
                            assert error.status is status

    run(go())


def test_a_reader_that_pauses_and_a_writer_that_does(serve_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than the server bears."""
    monkeypatch.setattr("cvmk.serving.client.stream.PATIENCE", 0.1)
    config = serve_config(limits={"stuck_seconds": 0.6, "idle_seconds": 0.5})
    expected = [one.text for one in Translator(config.models["en-de"].path).translate(SENTENCES)]

    async def go() -> None:
        async with serving(config) as (server, channel), AsyncClient(f"127.0.0.1:{server.ports.grpc}") as client, client.stream() as stream:
            for index, word in enumerate(TEXT.split(" ")):
                await stream.append(word + " ")
                await asyncio.sleep(1.2 if index == 7 else 0.08)
            await stream.close()
            found: dict[int, str] = {}
            async for update in stream:
                found[update.segment] = found.get(update.segment, "") + update.committed
        assert list(found.values()) == expected

    run(go())


class ServerProcess:
    """`cvmk serve` in a process of its own, at a port that stays."""

    def __init__(self, toml: Path) -> None:
        self._toml = toml
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)}
        code = "import sys; from cvmk.cli import main; sys.exit(main(['serve', sys.argv[1]]))"
        self._process = subprocess.Popen([sys.executable, "-c", code, str(self._toml)], env=environment, stderr=subprocess.DEVNULL)

    def end(self, number: int = signal.SIGKILL) -> None:
        """By a signal; returns when it is gone."""
        if self._process is not None:
            self._process.send_signal(number)
            assert self._process.wait(30) in (0, -number, 128 + number)  # told to end while it starts, it just does
            self._process = None


@pytest.fixture
def killable(serve_config: Any, tmp_path: Path) -> Any:
    """A server process, its address, and the folder of its model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    model = serve_config().models["en-de"].path
    toml = tmp_path / "serve.toml"
    toml.write_text(f'[server]\nport = {port}\n[models.en-de]\npath = "{model}"\nthreads = 1\n', encoding="utf-8")
    process = ServerProcess(toml)
    yield process, f"127.0.0.1:{port}", model
    process.end()


async def killed_at_random(process: ServerProcess, address: str, seed: int, kills: int, **options: Any) -> list[str]:
    """The committed text where the server is killed, or told to end, behind random words, and started again."""
    chances = random.Random(seed)
    words = TEXT.split(" ")
    places = sorted(chances.sample(range(1, len(words)), kills))
    found: dict[int, str] = {}
    async with AsyncClient(address, retry=Retry(tries=200, first_delay=0.05, max_delay=0.2)) as client, client.stream(**options) as stream:

        async def write() -> None:
            for number, word in enumerate(words):
                if number in places:
                    await asyncio.to_thread(process.end, chances.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                    await asyncio.sleep(chances.choice([0, 0.05]))
                    process.start()
                    if chances.random() < 0.5:
                        while not stream.connected:
                            await asyncio.sleep(0.01)
                await stream.append(word + " ")
                await asyncio.sleep(chances.choice([0, 0.002, 0.02]))
            await stream.close()

        writer = asyncio.create_task(write())
        revision = 0
        async for update in stream:
            assert update.revision == revision + 1
            revision = update.revision
            found[update.segment] = found.get(update.segment, "") + update.committed
        await writer
    assert sorted(found) == list(range(len(found)))
    return [found[segment] for segment in sorted(found)]


def test_a_killed_server(killable: Any) -> None:
    process, address, model = killable
    expected = [one.text for one in Translator(model).translate(SENTENCES)]
    process.start()
    assert run(killed_at_random(process, address, 1, 2)) == expected


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(8))
def test_a_server_that_is_killed_at_every_place(killable: Any, seed: int) -> None:
    process, address, model = killable
    process.start()
    expected = [one.text for one in Translator(model).translate(SENTENCES)]
    assert run(killed_at_random(process, address, seed, 4)) == expected
    assert len(run(killed_at_random(process, address, seed, 2, policy=LocalAgreement()))) == len(SENTENCES)
