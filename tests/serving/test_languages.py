"""Streams and requests whose source language nobody named, over several models."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from served import append, ask, request, serving, stream

from cvmk.inference import Translator
from cvmk.serving import messages

PAIRS = (("en", "fr"), ("de", "fr"), ("fr", "en"))
ENGLISH, GERMAN = "The weather is very nice today in the city.", "Das Wetter ist heute in der Stadt sehr schön."


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 90))


def translated(config: Any, pair: str, text: str) -> str:
    return Translator(config.models[pair].path).translate([text])[0].text


def test_each_text_goes_to_the_model_of_its_language(serve_config: Any) -> None:
    config = serve_config(PAIRS, {"max_length": 120})

    async def go() -> None:
        async with serving(config) as (_, channel):
            found = await ask(channel, "Translate", messages.TranslateRequest(texts=[ENGLISH.encode(), GERMAN.encode()], source="auto", target="fr"))
            assert [one.language.code for one in found.translations] == ["en", "de"]
            assert [one.text.decode() for one in found.translations] == [translated(config, "en-fr", ENGLISH), translated(config, "de-fr", GERMAN)]
            with pytest.raises(grpc.aio.AioRpcError, match="target is missing, and en, fr are served"):
                await ask(channel, "Translate", messages.TranslateRequest(texts=[b"a"]))
            ranked = (await ask(channel, "Detect", messages.DetectRequest(texts=[GERMAN.encode()]))).detections[0].languages
            assert ranked[0].code == "de" and len(ranked) == 3 and sum(one.probability for one in ranked) == pytest.approx(1)

    run(go())


async def words(call: Any, text: str) -> list[Any]:
    """What a stream says to a text that comes in words, as it has read each."""
    found = [await call.read()]
    for index, word in enumerate(text.split(" ")):
        await call.write(append(index + 1, f"{word} ", found[-1].revision))
        await asyncio.sleep(0.02)
    await call.write(request(close=messages.Close()))
    while (response := await call.read()) is not grpc.aio.EOF:
        found.append(response)
    return found


def test_a_stream_waits_for_its_language_and_follows_it(serve_config: Any) -> None:
    config = serve_config(PAIRS, {"max_length": 120})

    async def go() -> None:
        async with serving(config) as (server, channel):
            await asyncio.to_thread(server.application.detect, GERMAN)  # the detector is there
            call = stream(channel)
            await call.write(request(open=messages.Open(source="auto", target="fr", credit=64)))
            found = await words(call, f"{GERMAN} {ENGLISH}")
            ends = [one for one in found if one.final]
            assert [one.committed_delta.decode() for one in ends] == [translated(config, "de-fr", GERMAN), translated(config, "en-fr", ENGLISH)]
            assert [one.language.code for one in ends] == ["de", "en"]
            assert all(one.seq_read >= 2 for one in found[1:])  # nothing is said of the first words
            call = stream(channel)
            await call.write(request(open=messages.Open(source="de", target="fr")))
            assert [one.committed_delta.decode() for one in await words(call, ENGLISH) if one.final] == [translated(config, "de-fr", ENGLISH)]

    run(go())


def test_a_text_too_short_to_tell_is_translated_at_its_end(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config(PAIRS)) as (_, channel):
            call = stream(channel)
            await call.write(request(open=messages.Open(source="auto", target="fr")))
            found = await words(call, "Hut")
            assert len(found) == 2 and found[1].final and found[1].language.code in ("en", "de")

    run(go())
