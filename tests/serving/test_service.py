"""The service over gRPC: what is answered, what is refused and how, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import grpc
import grpc.aio
import pytest
from served import append, ask, refused, request, serving, stream

from cvmk.inference import Translator
from cvmk.serving import messages
from cvmk.serving.auth import Caller
from cvmk.serving.errors import ServiceError
from cvmk.serving.events import Opening

CODES = grpc.StatusCode


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def told(call: Any, *requests: Any, acknowledge: bool = True) -> list[Any]:
    """All that a stream says to some requests, each sent when the one before has been; its end."""
    for one in requests:
        await call.write(one)
    found = []
    closed = any(one.WhichOneof("event") == "close" for one in requests if not isinstance(one, bytes))
    async for response in call:
        found.append(response)
        if acknowledge and not closed and response.revision:
            await call.write(request(response.revision))
    return found


def text_of(responses: list[Any]) -> list[str]:
    """The committed text of each segment."""
    found: dict[int, bytes] = {}
    for response in responses:
        found[response.segment] = found.get(response.segment, b"") + response.committed_delta
    return [found[segment].decode() for segment in sorted(found)]


# -- whole texts --------------------------------------------------------------------------------------------------------------------------
def test_translate(serve_config: Any) -> None:
    config = serve_config()
    translator = Translator(config.models["en-de"].path)
    sentences = ["a man rides", "two horses", "ride a man"]
    expected = [one.text for one in translator.translate(sentences)]
    best = translator.translate(sentences[:1], beam_size=3, n_best=3)[0]

    async def go() -> None:
        async with serving(config) as (server, channel):
            found = await ask(channel, "Translate", messages.TranslateRequest(texts=[one.encode() for one in sentences], source="en", target="DE"))
            assert [one.text.decode() for one in found.translations] == expected and found.model == "en-de"
            text = f" {sentences[0]}.\n\n{sentences[1]}\n\t{sentences[2]} "
            found = await ask(channel, "Translate", messages.TranslateRequest(texts=[text.encode(), b"", b" \n "]))
            full = [one.text for one in translator.translate([f"{sentences[0]}.", *sentences[1:]])]
            assert [one.text.decode() for one in found.translations] == [f" {full[0]}\n\n{full[1]}\n\t{full[2]} ", "", " \n "]
            found = await ask(channel, "Translate", messages.TranslateRequest(texts=[sentences[0].encode()], alternatives=2))
            one = found.translations[0]
            assert [one.text.decode(), *(other.decode() for other in one.alternatives)] == [other.text for other in best.hypotheses]
            assert one.language.code == "en" and one.score == pytest.approx(best.score, rel=1e-6)
            assert (await ask(channel, "GetStats")).translations == 7

    run(go())


def test_languages_have_their_english_names(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config((("en", "de"), ("en", "hsb"), ("zh-Hant", "en")))) as (server, _):
            found = [(one.code, one.name, one.targets) for one in server.application.languages()]
            assert found == [("en", "English", ["de", "hsb"]), ("zh-Hant", "Chinese (Traditional)", ["en"])]

    run(go())


def test_what_a_request_may_not_have(serve_config: Any) -> None:
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"texts": []}, CODES.INVALID_ARGUMENT, "texts is empty"),
        ({"texts": [b"a", b"\xff"]}, CODES.INVALID_ARGUMENT, "texts[1] is not UTF-8"),
        ({"texts": [b"a\0"]}, CODES.INVALID_ARGUMENT, "texts[0] has a NUL"),
        ({"texts": [b"a" * 70_000]}, CODES.INVALID_ARGUMENT, "texts[0] is longer"),
        ({"texts": [b"a"] * 200}, CODES.INVALID_ARGUMENT, "texts has 200"),
        ({"texts": [b"a"], "beam_size": 1000}, CODES.INVALID_ARGUMENT, "beam_size"),
        ({"texts": [b"a"], "alternatives": 10_000}, CODES.INVALID_ARGUMENT, "alternatives"),
        ({"texts": [b"a"], "priority": 77}, CODES.INVALID_ARGUMENT, "priority is 77"),
        ({"texts": [b"a"], "source": "xx-nothing"}, CODES.INVALID_ARGUMENT, "source"),
        ({"texts": [b"a"], "source": "fr"}, CODES.NOT_FOUND, "no model translates from fr"),
        ({"texts": [b"a"], "target": "fr"}, CODES.NOT_FOUND, "to fr"),
        ({"texts": [b"a"], "model": "none"}, CODES.NOT_FOUND, "no model 'none' is served"),
    ]

    async def go() -> None:
        async with serving(serve_config()) as (_, channel):
            for fields, code, said in cases:
                found = await refused(ask(channel, "Translate", messages.TranslateRequest(**fields)))
                assert found[0] is code and said in found[1], found
            assert (await refused(ask(channel, "Translate", b"\xff\xff\xff")))[0] is CODES.INVALID_ARGUMENT
            code, _ = await refused(channel.unary_unary(f"/{messages.SERVICE}/Nothing")(b""))
            assert code is CODES.UNIMPLEMENTED
            code, said = await refused(ask(channel, "Translate", messages.TranslateRequest(texts=[b"a" * 60_000] * 5)))
            assert code is CODES.RESOURCE_EXHAUSTED and "larger than max" in said
            await ask(channel, "Translate", messages.TranslateRequest(texts=[b"a man"]))

    run(go())


def test_odd_texts(serve_config: Any) -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4"
    odd = ["\u202e evil", "e" + "\u0301" * 5000, family, "x" * 30_000, "\ufeff\ufffe\uffff", "a" * 300 + " " + "b " * 500]

    async def go() -> None:
        async with serving(serve_config()) as (server, channel):
            for text in odd:
                await ask(channel, "Translate", messages.TranslateRequest(texts=[text.encode()]))
                call = stream(channel)
                responses = await told(call, request(open=messages.Open(source="en")), append(1, text), request(close=messages.Close()))
                assert await call.code() is CODES.OK and responses[-1].final
            assert server.application.stats().sessions == 0

    run(go())


@pytest.mark.parametrize("count", [500, pytest.param(100_000, marks=[pytest.mark.exhaustive, pytest.mark.timeout(1200)])])
def test_random_bytes(serve_config: Any, count: int) -> None:
    """As messages, whole or as parts of a sound one: never INTERNAL, never UNKNOWN, and the server goes on."""
    generator = random.Random(0)
    sound = [
        messages.TranslateRequest(texts=[b"a man"], source="en").SerializeToString(),
        messages.StreamRequest(append=messages.Append(seq=1, text=b"a man")).SerializeToString(),
        messages.StreamRequest(open=messages.Open(source="en", policy=messages.Policy(wait_k=messages.WaitK(k=3)))).SerializeToString(),
    ]
    allowed = {CODES.OK, CODES.INVALID_ARGUMENT, CODES.RESOURCE_EXHAUSTED, CODES.NOT_FOUND, CODES.FAILED_PRECONDITION, CODES.UNIMPLEMENTED}
    methods = ("Translate", "Detect", "ListModels", "GetStats", "Stream")

    def data() -> bytes:
        kind = generator.randrange(3)
        if kind == 0:
            return generator.randbytes(generator.randrange(200))
        changed = bytearray(generator.choice(sound))
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        return bytes(changed[: generator.randrange(1, len(changed) + 1)]) if kind == 1 else bytes(changed)

    async def one(channel: Any) -> Any:
        method = generator.choice(methods)
        if method == "Stream":
            call = stream(channel)
            try:
                for _ in range(generator.randrange(1, 4)):
                    await call.write(data())
                await call.done_writing()
                async for _ in call:
                    pass
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
            code = await call.code()
            # A write that meets the end of a call hides how the server ended it, in grpc.aio; the server's own count says that.
            return CODES.OK if code is CODES.INTERNAL and await call.details() == "Internal error from Core" else code
        try:
            await ask(channel, method, data())
        except grpc.aio.AioRpcError as error:
            return error.code()
        return CODES.OK

    async def go() -> None:
        async with serving(serve_config(limits={"sessions_per_client": 100, "events_per_second": 100_000})) as (server, channel):
            for _ in range(count // 50):
                found = await asyncio.gather(*(one(channel) for _ in range(50)))
                assert set(found) <= allowed, set(found) - allowed
            await ask(channel, "Translate", messages.TranslateRequest(texts=[b"a man"]))
            assert server.application.stats().sessions == 0
            counted = server.application.metrics.exposition()[0].decode()
            assert 'status="OK"' in counted and 'status="INTERNAL"' not in counted

    asyncio.run(asyncio.wait_for(go(), 1200))


# -- streams ------------------------------------------------------------------------------------------------------------------------------
POLICIES = [messages.Policy(), messages.Policy(local_agreement=messages.LocalAgreement(agreeing=2)), messages.Policy(wait_k=messages.WaitK(k=1))]


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_a_stream_ends_with_the_translation_of_its_text(serve_config: Any, direction: str) -> None:
    config = serve_config(model={"encoder_direction": direction})
    translator = Translator(config.models["en-de"].path)
    sentences = ["A man rides a horse.", "Two horses ride.", "A man"]
    expected = [one.text for one in translator.translate(sentences)]
    words = " ".join(sentences).split(" ")

    async def go() -> None:
        async with serving(config) as (server, channel):
            for policy in POLICIES:
                call = stream(channel)
                await call.write(request(open=messages.Open(source="en", policy=policy)))
                parts = [append(index + 1, f"{word} ") for index, word in enumerate(words)]
                responses = await told(call, *parts, request(end_segment=messages.EndSegment()), request(close=messages.Close()))
                assert await call.code() is CODES.OK
                assert responses[0].opened.model == "en-de" and responses[0].opened.target == "de"
                assert sum(one.final for one in responses) == 3 and responses[-1].seq_read == len(words)
                assert [one.revision for one in responses[1:]] == list(range(1, len(responses)))
                if not policy.WhichOneof("policy"):
                    assert text_of(responses[1:]) == expected
            assert server.application.stats().sessions == 0

    run(go())


def test_only_fresh_text_reaches_a_reader_that_does_not_acknowledge(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config()) as (_, channel):
            call = stream(channel)
            await call.write(request(open=messages.Open(source="en", policy=messages.Policy(retranslation=messages.Retranslation(mask=0)))))
            for index in range(12):
                await call.write(append(index + 1, f"man{index} "))
                await asyncio.sleep(0.01)
            assert (await call.read()).opened.session
            first, second = await call.read(), await call.read()
            assert (first.revision, second.revision) == (1, 2)
            await call.write(request(2))
            third = await call.read()
            assert third.seq_read > 4 and third.revision == 3
            await call.write(request(3, close=messages.Close()))
            assert (await call.read()).final
            assert await call.read() is grpc.aio.EOF

    run(go())


def test_replacing(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config()) as (_, channel):
            call = stream(channel)
            await call.write(request(open=messages.Open(source="en")))
            await call.write(append(1, "A man rides. Two hor"))
            responses = [await call.read(), await call.read()]
            assert responses[1].final and responses[1].segment == 0
            await call.write(request(1, replace=messages.Replace(seq=2, from_char=4, text=b"dogs", segment=0)))
            late = await call.read()
            while not late.HasField("refused"):
                late = await call.read()
            assert late.refused.seq == 2 and "ended" in late.refused.reason and (late.segment, late.segment_begin) == (1, 13)
            await call.write(request(replace=messages.Replace(seq=3, from_char=4, text=b"dogs", segment=1)))
            await call.write(request(replace=messages.Replace(seq=4, from_char=99, text=b"dogs")))
            await call.write(request(close=messages.Close()))
            rest = []
            while (response := await call.read()) is not grpc.aio.EOF:
                rest.append(response)
            assert [one.refused.seq for one in rest if one.HasField("refused")] == [4]
            config = serve_config()
            assert text_of([one for one in rest if one.final]) == [Translator(config.models["en-de"].path).translate(["Two dogs"])[0].text]

    run(go())


def test_what_a_stream_may_not_do(serve_config: Any) -> None:
    opened = request(open=messages.Open(source="en"))
    cases: list[tuple[list[Any], Any, str]] = [
        ([append(1, "a")], CODES.FAILED_PRECONDITION, "the first message must be open"),
        ([opened, opened], CODES.FAILED_PRECONDITION, "open comes once"),
        ([opened, append(2, "a")], CODES.INVALID_ARGUMENT, "append.seq is 2, and 1 comes next"),
        ([opened, append(1, "a"), append(1, "a")], CODES.INVALID_ARGUMENT, "append.seq is 1, and 2 comes next"),
        ([opened, request(7)], CODES.INVALID_ARGUMENT, "ack_revision is 7"),
        ([opened, append(1, b"\xff")], CODES.INVALID_ARGUMENT, "append.text is not UTF-8"),
        ([request(open=messages.Open(source="en", credit=65))], CODES.INVALID_ARGUMENT, "open.credit is 65"),
        ([request(open=messages.Open(source="en", session="a\nb"))], CODES.INVALID_ARGUMENT, "open.session"),
        ([request(open=messages.Open(source="en", beam_size=99))], CODES.INVALID_ARGUMENT, "beam_size"),
        ([request(open=messages.Open(source="en", priority=9))], CODES.INVALID_ARGUMENT, "open.priority is 9"),
        ([request(open=messages.Open(target="fr"))], CODES.NOT_FOUND, "to fr"),
        ([request(open=messages.Open(source="en", committed=b"a man " * 300))], CODES.INVALID_ARGUMENT, "open.committed has"),
        (
            [request(open=messages.Open(policy=messages.Policy(local_agreement=messages.LocalAgreement(agreeing=0))))],
            CODES.INVALID_ARGUMENT,
            "open.policy.local_agreement",
        ),
    ]

    async def go() -> None:
        async with serving(serve_config()) as (server, channel):
            for requests, code, said in cases:
                call = stream(channel)
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    for one in requests:
                        await call.write(one)
                    await told(call)
                assert error.value.code() is code and said in (error.value.details() or ""), (requests, error.value)
            call = stream(channel)
            await call.done_writing()
            with pytest.raises(grpc.aio.AioRpcError, match="the first message must be open"):
                await told(call)
            assert server.application.stats().sessions == 0 and server.application.limits.sessions == 0

    run(go())


def test_nothing_comes_after_close(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config()) as (server, _):
            async with server.application.open(Caller("peer:test"), Opening(source="en")) as session:
                session.close()
                for event in (lambda: session.append(1, "a"), session.end_segment, session.close):
                    with pytest.raises(ServiceError, match="came after close"):
                        event()
                assert await session.next() is None

    run(go())


def test_half_closed_and_empty(serve_config: Any) -> None:
    async def go() -> None:
        async with serving(serve_config()) as (_, channel):
            call = stream(channel)
            await call.write(request(open=messages.Open(source="en")))
            await call.write(append(1, "a man"))
            await call.done_writing()
            assert [one.final for one in await told(call, acknowledge=False)][-1]  # what was not closed is said too
            call = stream(channel)
            responses = await told(call, request(open=messages.Open(source="en")), append(1, "  \n "), request(close=messages.Close()))
            assert len(responses) == 1 and await call.code() is CODES.OK

    run(go())


def test_resuming_goes_on_with_what_was_committed(serve_config: Any) -> None:
    policy = messages.Policy(wait_k=messages.WaitK(k=1))

    async def words(channel: Any, parts: list[str], **opening: Any) -> list[Any]:
        """What is said to parts of a text, each read before the next is sent."""
        call = stream(channel)
        await call.write(request(open=messages.Open(source="en", policy=policy, **opening)))
        found = [await call.read()]
        for index, part in enumerate(parts):
            await call.write(append(index + 1, part, found[-1].revision))
            found.append(await call.read())
        await call.write(request(close=messages.Close()))
        while (response := await call.read()) is not grpc.aio.EOF:
            found.append(response)
        return found

    async def go() -> None:
        async with serving(serve_config()) as (_, channel):
            for parts in itertools.permutations(["a man ", "rides ", "two ", "horses "]):
                whole = await words(channel, list(parts))
                count = next((index for index, one in enumerate(whole) if one.committed_pieces), 0)
                if count:  # a random model may say nothing that ends a word
                    break
            committed = whole[count]
            resumed = {"first_segment": 5, "committed": committed.committed_delta, "committed_pieces": committed.committed_pieces}
            rest = await words(channel, ["".join(parts[: count + 1]), *parts[count + 1 :]], **resumed)
            assert committed.committed_delta and {one.segment for one in rest[1:]} == {5}
            assert committed.committed_delta.decode() + text_of(rest[1:])[0] == text_of(whole[1:])[0]

    run(go())
