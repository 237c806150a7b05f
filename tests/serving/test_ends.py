"""Streams at their edges: text that is nothing to a model, sentences that are emptied, models that go, marks where a sentence has ended, late translations."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from served import append, ask, request, serving, stream

from cvmk.inference import Translator
from cvmk.serving import AsyncClient, Retry, messages
from cvmk.serving.client.outgoing import Outgoing
from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.scheduler import Scheduler


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_a_sentence_that_is_nothing_to_a_model_stays_as_it_is(serve_config: Any) -> None:
    config = serve_config()
    expected = Translator(config.models["en-de"].path).translate(["a man", "two dogs"])

    async def go() -> None:
        async with serving(config) as (_, channel):
            texts = ["a man\n\ufeff\ntwo dogs", "\ufeff"]
            found = await ask(channel, "Translate", messages.TranslateRequest(texts=[text.encode() for text in texts], source="en"))
            assert [one.text.decode() for one in found.translations] == ["\n\ufeff\n".join(one.text for one in expected), "\ufeff"]

    run(go())


async def rest(call: Any) -> list[Any]:
    found = []
    while (response := await call.read()) is not grpc.aio.EOF:
        found.append(response)
    return found


@pytest.mark.parametrize("text", ["\ufeff", "\ufeff ", "\u200b ", "\u00ad \u2060"])
@pytest.mark.parametrize("partial_words", [False, True])
def test_text_that_is_nothing_to_a_model(serve_config: Any, text: str, partial_words: bool) -> None:
    """The server goes on, and so does the stream."""
    config = serve_config()
    expected = Translator(config.models["en-de"].path).translate(["a man"])[0].text

    async def go() -> None:
        async with serving(config) as (_, channel):
            call = stream(channel)
            await call.write(request(open=messages.Open(source="en", partial_words=partial_words)))
            await call.write(append(1, text))
            await asyncio.sleep(0.05)
            await asyncio.wait_for(ask(channel, "GetStats"), 5)
            await call.write(request(end_segment=messages.EndSegment()))
            await call.write(append(2, "a man"))
            await call.write(request(close=messages.Close()))
            assert [one.committed_delta.decode() for one in await rest(call) if one.final][-1] == expected

    run(go())


def test_a_sentence_that_is_emptied_is_taken_back(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config()) as (_, channel):
            call = stream(channel)
            await call.write(request(open=messages.Open(source="en", policy=messages.Policy(retranslation=messages.Retranslation(mask=0)))))
            await call.write(append(1, "a man rides "))
            await call.read()
            shown = await call.read()
            assert shown.tentative
            await call.write(request(shown.revision, replace=messages.Replace(seq=2, from_char=0, text=b"")))
            gone = await call.read()
            assert not gone.tentative and not gone.final and gone.deleted_chars == len(shown.tentative.decode()) and gone.seq_read == 2
            await call.write(request(gone.revision, close=messages.Close()))
            assert await rest(call) == []

    run(go())


def test_the_end_of_a_sentence_is_said_though_its_model_was_unloaded(serve_config: Any) -> None:
    config = serve_config((("en", "de"), ("de", "en")))
    expected = Translator(config.models["en-de"].path).translate(["a man rides"])[0].text

    async def go() -> None:
        async with serving(config) as (server, channel):
            call = stream(channel)
            await call.write(request(open=messages.Open(source="en", target="de")))
            await call.write(append(1, "a man rides "))
            await call.read()
            await call.read()
            await server.application.unload("en-de")
            await call.write(request(close=messages.Close()))
            found = []
            with pytest.raises(grpc.aio.AioRpcError) as error:
                while (response := await call.read()) is not grpc.aio.EOF:
                    found.append(response)
            assert error.value.code() is grpc.StatusCode.NOT_FOUND and [one.committed_delta.decode() for one in found if one.final] == [expected]

    run(go())


def test_numbers_have_no_language_and_are_translated(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config((("en", "fr"), ("de", "fr")), {"max_length": 120})) as (_, channel):
            call = stream(channel)
            await call.write(request(open=messages.Open(source="auto", target="fr", credit=64)))
            for index in range(30):
                await call.write(append(index + 1, "0123456789 " * 10))
            await call.read()
            assert (await asyncio.wait_for(call.read(), 20)).language.code in ("en", "de")
            call.cancel()

    run(go())


def test_a_stream_of_unknown_language_is_taken_up_by_the_model_of_its_language(serve_config: Any) -> None:
    config = serve_config((("en", "fr"), ("de", "fr")), {"max_length": 160})
    german = "Das Wetter ist heute in der Stadt sehr schön"
    translator = Translator(config.models["de-fr"].path)
    pieces = translator.translate([german])[0].tokens[:6]
    committed = translator.tokenizer.decode(pieces)

    async def go() -> None:
        async with serving(config) as (server, channel):
            await asyncio.to_thread(server.application.detect, german)
            call = stream(channel)
            opening = messages.Open(source="auto", target="fr", first_segment=3, committed=committed.encode(), committed_pieces=pieces)
            await call.write(request(open=opening))
            await call.write(append(1, german))
            await call.write(request(close=messages.Close()))
            found = await rest(call)
            last = [one for one in found if one.final][-1]
            with translator.session() as session:
                session.source = german
                session.commit(pieces)
                expected = session.translate().text
            assert last.segment == 3 and last.language.code == "de" and committed + b"".join(one.committed_delta for one in found).decode() == expected

    run(go())


@pytest.mark.parametrize(("text", "end"), [("Hello\n", 5), ("你好。 ", 3), ("Hello.", 6)])
def test_a_mark_behind_a_sentence_that_has_ended_ends_nothing_more(text: str, end: int) -> None:
    """Else the next connection would end a sentence before its text."""
    outgoing = Outgoing()
    outgoing.connect(0)
    outgoing.append(text)
    outgoing.end_segment()
    while outgoing.next_request() is not None:
        pass
    outgoing.ended(end)
    outgoing.append("Next one")
    outgoing.connect(1)
    kinds = []
    while (message := outgoing.next_request()) is not None:
        kinds.append(message.WhichOneof("event"))
    assert kinds and set(kinds) == {"append"}


def test_a_client_tries_again_where_its_sentence_came_too_late(serve_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = serve_config()
    expected = Translator(config.models["en-de"].path).translate(["a man rides"])[0].text
    turn, late = Scheduler.turn, [2]

    def slow(self: Scheduler, *arguments: Any, **fields: Any) -> Any:
        if late[0]:
            late[0] -= 1
            raise ServiceError(Status.DEADLINE_EXCEEDED, "the translation was not ready in time")
        return turn(self, *arguments, **fields)

    async def go() -> None:
        async with serving(config) as (server, _):
            async with AsyncClient(f"127.0.0.1:{server.ports.grpc}", retry=Retry(first_delay=0.01, max_delay=0.05)) as client:
                async with client.stream(source="en") as live:
                    monkeypatch.setattr(Scheduler, "turn", slow)
                    await live.append("a man rides")
                    await live.close()
                    assert "".join([update.committed async for update in live]) == expected and late == [0]

    run(go())
