"""What goes wrong inside the server: it stays with the one whose work it was, and the client is told a number and nothing else."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import grpc
import grpc.aio
import pytest
from served import append, ask, idle, request, serving, stream, until

from cvmk.inference import Translator
from cvmk.inference.engine import Finished
from cvmk.inference.options import BROKEN
from cvmk.serving import messages

CODES = grpc.StatusCode
SECRET = "the secret of /etc/passwd"
TEXTS = ["a man rides", "two horses", "ride a man", "a horse rides two men"]
NUMBER = re.compile(r"[0-9a-f]{8}")


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def engine_of(server: Any, name: str = "en-de") -> Any:
    return next(served for served in server.application.catalogue if served.info.name == name).translator.engine


def translation(channel: Any, text: str, **options: Any) -> Any:
    async def told() -> str:
        return (await ask(channel, "Translate", messages.TranslateRequest(texts=[text.encode()], source="en"), **options)).translations[0].text.decode()

    return told()


async def streamed(channel: Any, text: str, pause: float = 0.0) -> str:
    """The committed text of a stream that is told a text word by word. Raises what it ended with."""

    async def requests() -> Any:
        yield request(open=messages.Open(source="en", credit=64))
        for index, word in enumerate(text.split(" ")):
            yield append(index + 1, f"{word} ")
            await asyncio.sleep(pause)
        yield request(close=messages.Close())

    return "".join([response.committed_delta.decode() async for response in stream(channel, request_iterator=requests())])


def check_internal(error: Any, caplog: pytest.LogCaptureFixture) -> None:
    """INTERNAL with a number that the log explains."""
    said = error.details()
    assert error.code() is CODES.INTERNAL and "secret" not in said and "passwd" not in str(error.trailing_metadata()), said
    numbers = NUMBER.findall(said)
    assert len(numbers) == 1, said
    assert any(numbers[0] in record.getMessage() and SECRET in str(record.exc_info) for record in caplog.records)


def test_a_step_that_fails_once_costs_nobody_anything(serve_config: Any) -> None:
    config = serve_config()
    expected = [one.text for one in Translator(config.models["en-de"].path).translate(TEXTS)]

    async def go() -> None:
        async with serving(config) as (server, channel):
            engine, step, steps = engine_of(server), engine_of(server).step, 0

            def failing() -> Any:
                nonlocal steps
                steps += 1
                if steps == 5:
                    raise RuntimeError(SECRET)
                return step()

            engine.step = failing
            found = await asyncio.gather(*(translation(channel, text) for text in TEXTS), *(streamed(channel, text) for text in TEXTS))
            assert found == expected * 2 and steps > 15
            await until(lambda: idle(server))

    run(go())


def test_a_request_that_fails_every_step_fails_alone(serve_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = serve_config()
    translator = Translator(config.models["en-de"].path)
    expected = [one.text for one in translator.translate(TEXTS)]
    poison = translator.encode("poison")

    async def go() -> None:
        async with serving(config) as (server, channel):
            engine = engine_of(server)
            step = engine.step

            def failing() -> Any:
                if any(list(one.source) == poison for one in list(engine._requests.values())):
                    raise RuntimeError(SECRET)
                time.sleep(0.001)
                return step()

            engine.step = failing
            good = [asyncio.create_task(translation(channel, text)) for text in TEXTS] + [asyncio.create_task(streamed(channel, text)) for text in TEXTS]
            await asyncio.sleep(0.01)
            for ask_for in (translation, streamed):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await ask_for(channel, "poison")
                check_internal(error.value, caplog)
                good.append(asyncio.create_task(translation(channel, TEXTS[0])))
            assert [await one for one in good] == [*expected, *expected, expected[0], expected[0]]
            await until(lambda: idle(server))

    run(go())


def test_an_engine_that_always_fails_answers_that_it_does(serve_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        async with serving(serve_config()) as (server, channel):
            engine, step = engine_of(server), engine_of(server).step
            engine.step = lambda: _raise()
            for bad in [translation(channel, text) for text in TEXTS] + [streamed(channel, text) for text in TEXTS]:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await bad
                check_internal(error.value, caplog)
            engine.step = step
            assert await translation(channel, TEXTS[0])
            await until(lambda: idle(server))

    def _raise() -> Any:
        raise RuntimeError(SECRET)

    run(go())


def test_a_tokenizer_that_fails(serve_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = serve_config()
    expected = [one.text for one in Translator(config.models["en-de"].path).translate(TEXTS)]

    async def go() -> None:
        async with serving(config) as (server, channel):
            tokenizer = next(iter(server.application.catalogue)).translator.tokenizer
            encode, decode = tokenizer.encode, tokenizer.decode

            def failing(text: str) -> Any:
                if "poison" in text:
                    raise ValueError(SECRET)
                return encode(text)

            tokenizer.encode = failing
            good = [asyncio.create_task(streamed(channel, text, 0.005)) for text in TEXTS]
            for bad in (translation(channel, "poison"), streamed(channel, "a man poison rides"), translation(channel, "a man. poison. a man.")):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await bad
                check_internal(error.value, caplog)
            assert [await one for one in good] == expected
            tokenizer.decode = lambda ids: failing("poison")
            for bad in (translation(channel, TEXTS[0]), streamed(channel, TEXTS[0])):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await bad
                check_internal(error.value, caplog)
            tokenizer.decode = decode
            assert await translation(channel, TEXTS[0]) == expected[0]
            await until(lambda: idle(server))

    run(go())


def test_no_memory_is_an_answer_for_a_request_and_a_delay_for_a_stream(serve_config: Any) -> None:
    config = serve_config(limits={"stuck_seconds": 20})
    expected = [one.text for one in Translator(config.models["en-de"].path).translate(TEXTS)]

    async def go() -> None:
        async with serving(config) as (server, channel):
            engine, step, failures = engine_of(server), engine_of(server).step, 3

            def without_memory() -> Any:
                nonlocal failures
                events = step()
                if failures and (ended := [event for event in events if isinstance(event, Finished)]):
                    failures -= 1
                    return [event for event in events if event not in ended] + [Finished(event.id, [BROKEN], "failed") for event in ended]
                return events

            engine.step = without_memory
            with pytest.raises(grpc.aio.AioRpcError, match="no memory") as error:
                await translation(channel, TEXTS[0])
            assert error.value.code() is CODES.RESOURCE_EXHAUSTED
            assert int(dict(error.value.trailing_metadata())["retry-after-ms"]) > 0
            assert await streamed(channel, TEXTS[1]) == expected[1] and failures == 0
            assert await translation(channel, TEXTS[0]) == expected[0]
            await until(lambda: idle(server))

    run(go())


def test_a_call_that_fails_outside_of_any_model(serve_config: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with serving(serve_config()) as (server, channel):
            application = server.application
            for name, method, message in (
                ("detect", "Detect", messages.DetectRequest(texts=[b"a man"])),
                ("models", "ListModels", None),
                ("stats", "GetStats", None),
                ("_languages_of", "Translate", messages.TranslateRequest(texts=[b"a man"])),
            ):
                with monkeypatch.context() as patch:
                    patch.setattr(application, name, lambda *given, **named: int(SECRET))
                    with pytest.raises(grpc.aio.AioRpcError) as error:
                        await ask(channel, method, message)
                    check_internal(error.value, caplog)
            with monkeypatch.context() as patch:
                patch.setattr(application.limits, "check_text", lambda field, data: data.decode() if field == "open.committed" else int(SECRET))
                call = stream(channel)
                await call.write(request(open=messages.Open(source="en")))
                await call.write(append(1, "a man"))
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    async for _ in call:  # what the stream's reader has failed at
                        pass
                check_internal(error.value, caplog)
            assert await translation(channel, "a man")
            await until(lambda: idle(server))

    run(go())
