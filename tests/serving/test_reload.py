"""Models that are replaced while they are in use."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from served import append, ask, request, serving, stream, until

from cvmk.config.schema import TokenizerConfig
from cvmk.formats import save_model_folder
from cvmk.inference import Translator
from cvmk.inference.native_engine import NativeEngine
from cvmk.serving import messages
from cvmk.text.tokenizers import train_tokenizer

CODES = grpc.StatusCode
TOKEN = "a-token-of-an-administrator"
TEXTS = ["a man rides", "two horses", "ride a man"]


def run(coroutine: Any, seconds: float = 100) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


@pytest.fixture
def config(serve_config: Any, tmp_path: Path) -> Any:
    (tmp_path / "keys").write_text(f"admin = {TOKEN}\n")
    return serve_config(server={"admin_port": 0}, security={"admin_keys": str(tmp_path / "keys")}, model={"max_length": 60})


@pytest.fixture
def other(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., str]:
    def made(name: str, seed: int = 7, **languages: str) -> str:
        """The folder of another version of the model."""
        model = make_model(tokenizer.vocab_size, seed=seed, sharpness=3.0, max_length=60)
        save_model_folder(tmp_path / name, model, tokenizer, "", {"languages": {"source": "en", "target": "de", **languages}})
        return str(tmp_path / name)

    return made


def engines() -> int:
    gc.collect()
    return sum(isinstance(one, NativeEngine) for one in gc.get_objects())


async def load(channel: Any, path: str) -> Any:
    message = messages.LoadRequest(model="en-de", path=path)
    return (await ask(channel, "Load", message, service=messages.ADMIN, metadata=(("authorization", f"Bearer {TOKEN}"),))).model


def texts_of(path: str) -> list[str]:
    return [one.text for one in Translator(path).translate(TEXTS)]


@contextlib.asynccontextmanager
async def administering(config: Any) -> Any:
    async with serving(config) as (server, channel), grpc.aio.insecure_channel(f"127.0.0.1:{server.ports.admin}") as admin:
        yield server, channel, admin


async def asked(channel: Any, known: list[list[str]], ended: asyncio.Event) -> int:
    """Translations, one after the other, each that of some version."""
    count = 0
    while not ended.is_set():
        index = count % len(TEXTS)
        found = await ask(channel, "Translate", messages.TranslateRequest(texts=[TEXTS[index].encode()], source="en"))
        assert found.translations[0].text.decode() in [version[index] for version in known]
        count += 1
    return count


async def spoken(channel: Any, known: list[list[str]], ended: asyncio.Event) -> int:
    """A stream over all versions; each sentence is of one of them."""
    call, count, said = stream(channel), 0, ""
    await call.write(request(open=messages.Open(source="en")))
    await call.read()
    while not ended.is_set():
        index = count % len(TEXTS)
        await call.write(append(count + 1, TEXTS[index]))
        await asyncio.sleep(0.002)
        await call.write(request(end_segment=messages.EndSegment()))
        said, final = "", False
        while not final:
            response = await call.read()
            said, final = said + response.committed_delta.decode(), response.final
            if not final:
                await call.write(request(response.revision))
        assert said in [version[index] for version in known]
        count += 1
    await call.write(request(close=messages.Close()))
    assert await call.read() is grpc.aio.EOF
    return count


def test_twenty_swaps_fail_nobody(config: Any, other: Callable[..., str]) -> None:
    paths = [config.models["en-de"].path, other("second")]
    known = [texts_of(path) for path in paths]
    assert known[0] != known[1]
    before = engines()

    async def go() -> None:
        async with administering(config) as (server, channel, admin):
            ended, versions = asyncio.Event(), set()
            idle = []
            for _ in range(3):
                call = stream(channel)
                await call.write(request(open=messages.Open(source="en")))
                await call.read()
                await call.write(append(1, "A man."))
                await call.write(request(end_segment=messages.EndSegment()))
                idle.append(call)
            tasks = [asyncio.create_task(work(channel, known, ended)) for work in (asked, asked, spoken, spoken)]
            for index in range(20):
                versions.add((await load(admin, paths[(index + 1) % 2])).version)
                found = await ask(channel, "Translate", messages.TranslateRequest(texts=[TEXTS[0].encode()], source="en"))
                assert found.translations[0].text.decode() == known[(index + 1) % 2][0]  # the new one at once
            ended.set()
            assert all(count > 20 for count in await asyncio.gather(*tasks)) and len(versions) == 2
            assert server.application.stats().rejected == 0
            await until(lambda: engines() == before + 1)  # streams that only wait keep none of the old ones
            for call in idle:
                await call.write(append(2, TEXTS[0]))
                await call.write(request(close=messages.Close()))
                said = ""
                while (response := await call.read()) is not grpc.aio.EOF:
                    said = said + response.committed_delta.decode() if response.segment else ""
                    await call.write(request(response.revision)) if not response.final else None
                assert said == known[0][0]

    run(go())
    assert engines() == before


def test_a_bad_model_is_refused_and_the_old_one_answers(config: Any, other: Callable[..., str], tmp_path: Path) -> None:
    sound, expected = other("sound"), texts_of(config.models["en-de"].path)
    before = engines()

    def broken(name: str, change: Callable[[Path], object]) -> str:
        shutil.copytree(sound, tmp_path / name)
        change(tmp_path / name)
        return str(tmp_path / name)

    def cut(file: str, keep: float) -> Callable[[Path], object]:
        return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[: int(keep * (folder / file).stat().st_size)])

    def flip(folder: Path) -> None:
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[len(data) // 2] ^= 0x55
        (folder / "model.safetensors").write_bytes(data)

    words = train_tokenizer(["quite other words of quite another text"] * 20, TokenizerConfig(kind="fallback", vocabulary=265))
    bad = {
        "nowhere": str(tmp_path / "nowhere"),
        "empty": broken("empty", lambda folder: [file.unlink() for file in folder.iterdir()]),
        "truncated": broken("truncated", cut("model.safetensors", 0.7)),
        "nearly truncated": broken("nearly", cut("model.safetensors", 0.999)),
        "nothing": broken("nothing", cut("model.safetensors", 0.0)),
        "a bit": broken("bit", flip),
        "no config": broken("config", cut("config.json", 0.5)),
        "half a tokenizer": broken("tokenizer", cut("tokenizer.json", 0.5)),
        "another tokenizer": broken("vocabulary", words.save),
        "other languages": other("languages", source="fr"),
    }

    async def go() -> None:
        async with administering(config) as (server, channel, admin):
            (model,) = (await ask(channel, "ListModels")).models
            ended = asyncio.Event()
            task = asyncio.create_task(asked(channel, [expected], ended))
            for name, path in bad.items():
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await load(admin, path)
                assert error.value.code() is CODES.FAILED_PRECONDITION, (name, error.value)
                assert "the model was not replaced" in (error.value.details() or "")
                assert (await ask(channel, "ListModels")).models == [model]
            ended.set()
            assert await task > 0
            assert server.application.stats().rejected == 0
            await until(lambda: engines() == before + 1)
            assert (await load(admin, sound)).version != model.version

    run(go())
