"""The clients, against a server that fails as it is told to: what a user sees is what they would have seen without the failures."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import certificates
import grpc
import pytest
from fake_server import FakeServer, InThread, Script
from new_process import said

from cvmk.errors import ConfigError, DataError
from cvmk.serving import AsyncClient, AsyncLiveStream, Client, LiveUpdate, NoServerError, Retry, Tls
from cvmk.serving.errors import ServiceError, Status
from cvmk.streaming import LocalAgreement, Policy, WaitK

QUICK = Retry(first_delay=0.002, max_delay=0.02)
TEXT = "We need a table. Thanks a lot. Where is the station of the train we want to take. No idea at all"
WHOLE = ["WE NEED A TABLE.", "THANKS A LOT.", "WHERE IS THE STATION OF THE TRAIN WE WANT TO TAKE.", "NO IDEA AT ALL"]


def run(work: Callable[[FakeServer, AsyncClient], Coroutine[Any, Any, Any]], script: Script | None = None, **options: Any) -> Any:
    """`work` with a server and its client."""

    async def both() -> Any:
        async with FakeServer(script) as server, AsyncClient(server.address, **{"retry": QUICK, **options}) as client:
            async with asyncio.timeout(30):
                return await work(server, client)

    return asyncio.run(both())


class Reader:
    """What somebody sees who takes every update; it must be one sequence."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.committed = self.tentative = ""
        self.revision = self.segment = self.read = 0

    def take(self, update: LiveUpdate) -> None:
        assert (update.revision, update.segment) == (self.revision + 1, self.segment)
        assert update.begin <= update.source_read and (not update.final or update.source_read > self.read)
        before, now = self.committed + self.tentative, self.committed + update.committed + update.tentative
        assert before[: len(before) - update.deleted] == now[: len(before) - update.deleted]
        self.revision, self.committed, self.tentative = update.revision, self.committed + update.committed, update.tentative
        if update.final:
            assert update.tentative == ""
            self.sentences.append(self.committed)
            self.read, self.segment, self.committed = update.source_read, update.segment + 1, ""

    async def take_all(self, stream: AsyncLiveStream) -> Reader:
        async for update in stream:
            self.take(update)
        return self


async def by_words(stream: AsyncLiveStream, text: str, pause: float = 0.0) -> Reader:
    """The text a word at a time, while its translation is read."""
    reader = asyncio.create_task(Reader().take_all(stream))
    for word in text.split(" "):
        await stream.append(word + " ")
        await asyncio.sleep(pause)
    await stream.close()
    return await reader


# Whole texts


def test_texts_languages_models_and_counts() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        one = await client.translate("hello", target="de")
        assert (one.text, one.model, one.score, one.alternatives) == ("HELLO", "capitals", -1.0, [])
        assert one.language is not None and one.language.code == "en"
        assert [found.text for found in await client.translate(["a", "ü"])] == ["A", "Ü"] and await client.translate([]) == []
        assert [language.code for language in await client.detect("hello")] == ["en", "de"]
        assert len(await client.detect(("a", "b"))) == 2
        (model,) = await client.models()
        assert (model.name, model.source, model.target, model.max_length, model.state) == ("capitals", "en", "de", 64, "ready")
        stats = await client.stats()
        assert (stats.translations, stats.sessions, stats.uptime_s, stats.draining) == (3, 2, 1.5, False)

    run(work)


def test_wrong_arguments_are_told_here() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        with pytest.raises(ServiceError, match=r"texts\[1\] has half of a surrogate pair"):
            await client.translate(["a", "\ud800"])
        with pytest.raises(TypeError, match="texts is a string, and bytes was given"):
            await client.translate(b"a")  # type: ignore[call-overload]
        for options, message in (
            ({"beam_size": -1}, "beam_size is -1"), ({"alternatives": True}, "alternatives is True"), ({"priority": "urgent"}, "priority is 'urgent'"),
            ({"timeout": 0}, "timeout is 0"),
        ):  # fmt: skip
            with pytest.raises(ConfigError, match=message):
                await client.translate("a", **options)  # type: ignore[call-overload]
        with pytest.raises(ConfigError, match="policy is 'guess', and must be one of retranslation, local-agreement, wait-k"):
            client.stream(policy="guess")

        class Other(Policy):
            def writes(self, view: Any) -> Any: ...

        with pytest.raises(ConfigError, match="policy is a Other"):
            client.stream(policy=Other())
        assert server.metadata == []

    run(work)


@pytest.mark.parametrize("address", ["localhost", "a b:1", "http://localhost:50051", "localhost:0", "localhost:65536", "::1:50051", ""])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server: give HOST:PORT"):
        AsyncClient(address)


def test_what_the_server_could_not_do_now_is_tried_again() -> None:
    unavailable, full = (grpc.StatusCode.UNAVAILABLE, None), (grpc.StatusCode.RESOURCE_EXHAUSTED, 60)

    async def work(server: FakeServer, client: AsyncClient) -> None:
        assert (await client.translate("a")).text == "A" and len(server.metadata) == 3
        server.script.refusals, server.metadata = [(grpc.StatusCode.CANCELLED, None)], []  # what gRPC's core says of more than its server comes to
        assert (await client.translate("a")).text == "A" and len(server.metadata) == 2
        server.script.refusals = [full]
        began = time.monotonic()
        await client.stats()
        assert time.monotonic() - began >= 0.06
        for code, hint in ((grpc.StatusCode.RESOURCE_EXHAUSTED, None), (grpc.StatusCode.INVALID_ARGUMENT, None), (grpc.StatusCode.UNAUTHENTICATED, None)):
            server.script.refusals, server.metadata = [(code, hint)], []
            with pytest.raises(ServiceError, match="not now") as caught:
                await client.translate("a")
            assert caught.value.status.name == code.name and len(server.metadata) == 1
        server.script.refusals, server.metadata = [unavailable] * 99, []
        with pytest.raises(ServiceError, match="not now"):
            await client.translate("a")
        assert len(server.metadata) == QUICK.tries
        server.script.refusals, server.metadata = [(grpc.StatusCode.RESOURCE_EXHAUSTED, 10_000)], []
        with pytest.raises(ServiceError) as caught:  # the hint lies behind the deadline: nobody waits for that
            await client.translate("a", timeout=5)
        assert caught.value.retry_after == 10 and len(server.metadata) == 1

    run(work, Script(refusals=[unavailable, unavailable]))


def test_deadlines() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        with pytest.raises(ServiceError) as caught:
            await client.translate("a", timeout=0.05)
        assert caught.value.status is Status.DEADLINE_EXCEEDED
        with pytest.raises(ServiceError) as caught:
            async with client.stream(timeout=0.05):
                pass
        assert caught.value.status is Status.DEADLINE_EXCEEDED
        assert server.script.stall is not None
        server.script.stall.set()
        async with client.stream(timeout=0.1) as stream:
            await stream.append("one two ")
            with pytest.raises(ServiceError) as caught:
                await Reader().take_all(stream)
            assert caught.value.status is Status.DEADLINE_EXCEEDED
            with pytest.raises(ServiceError):
                await stream.append("three")

    run(work, Script(stall=asyncio.Event()))


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

    async def ask() -> None:
        async with AsyncClient(address, retry=Retry(tries=2, first_delay=0.001)) as client:
            for work in (client.models(), client.stream().__aenter__()):
                with pytest.raises(NoServerError, match=rf"no server answers at {address} \(Connection refused\)") as caught:
                    await work
                assert caught.value.exit_code == DataError.exit_code and caught.value.status is Status.UNAVAILABLE

    asyncio.run(ask())


def test_delays() -> None:
    random.seed(0)
    retry, gone = Retry(tries=99, first_delay=0.1, max_delay=2), ServiceError(Status.UNAVAILABLE, "gone")
    for failures, longest in ((1, 0.1), (2, 0.2), (4, 0.8), (6, 2), (90, 2)):
        delays = [retry.delay(failures, gone) or 0.0 for _ in range(300)]
        assert 0 <= min(delays) < 0.1 * longest and 0.9 * longest < max(delays) <= longest
    hint = ServiceError(Status.RESOURCE_EXHAUSTED, "full", retry_after=3)
    assert all(3 <= (retry.delay(1, hint) or 0.0) <= 3.1 for _ in range(50))
    assert retry.delay(99, gone) is None and retry.delay(1, ServiceError(Status.RESOURCE_EXHAUSTED, "full")) is None
    for wrong in ({"tries": 0}, {"first_delay": -1}, {"first_delay": 3, "max_delay": 2}):
        with pytest.raises(ConfigError):
            Retry(**wrong)  # type: ignore[arg-type]


# Streams


def test_a_stream() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        async with client.stream(source="en", target="de", policy=LocalAgreement(3, mask=1), priority="high", credit=5, session="mine") as stream:
            assert (stream.session, stream.model, stream.target, stream.connected) == ("mine", "capitals", "de", True)
            updates = []
            for piece in ("one ", "two", " three.", " four"):
                await stream.append(piece)
                if piece in ("one ", " three."):
                    updates.append(await anext(stream))
            await stream.close()
            updates += [update async for update in stream]
            with pytest.raises(RuntimeError, match="the stream is closed"):
                await stream.append("five")
        told = [(update.segment, update.committed, update.tentative, update.deleted, update.source_read, update.begin, update.final) for update in updates]
        assert told == [(0, "", "ONE", 0, 3, 0, False), (0, "ONE TWO THREE.", "", 0, 14, 0, True), (1, "FOUR", "", 0, 19, 14, True)]
        (opened,) = server.opened
        assert (opened.source, opened.priority, opened.credit, opened.policy.local_agreement.agreeing, opened.policy.local_agreement.mask) == ("en", 3, 5, 3, 1)
        assert [request.ack_revision for request in server.requests[0]][-1] >= 2  # told by itself
        with pytest.raises(RuntimeError, match="entered once"):
            await stream.__aenter__()
        with pytest.raises(RuntimeError, match="not open"):
            await client.stream().append("a")
        async with client.stream(policy=WaitK(7)):
            assert server.opened[-1].policy.wait_k.k == 7

    run(work)


@pytest.mark.parametrize("commit_words", [False, True])
@pytest.mark.parametrize("kind", ["drop_before_response", "drop_behind_request"])
def test_wherever_it_breaks_the_text_is_that_of_an_unbroken_stream(kind: str, commit_words: bool) -> None:
    """Every event of the stream is once the one at which the connection breaks, and random pairs of them."""
    chances = random.Random(len(kind) + commit_words)
    breaks = [[place] for place in range(1, 24)] + [[chances.randint(1, 20) for _ in range(5)] for _ in range(20)]

    async def work(server: FakeServer, client: AsyncClient) -> None:
        broken = 0
        for places in breaks:
            server.script = Script(commit_words=commit_words, **{kind: list(places)})
            server.requests = []
            async with client.stream() as stream:
                reader = await by_words(stream, TEXT, chances.choice([0, 0.001, 0.002]))
                assert reader.sentences == WHOLE and stream.source.strip() == ""
            assert reader.read <= len(TEXT) + 1
            broken += len(server.requests) > 1
        assert broken > len(breaks) // 3

    run(work)


def test_a_server_that_is_restarted() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        async with client.stream(session="long") as stream:
            reader = asyncio.create_task(Reader().take_all(stream))
            for number, word in enumerate(TEXT.split(" ")):
                if number in (2, 9):
                    await server.stop()
                if number == 12:
                    assert not stream.connected
                if number in (5, 14):
                    await server.start()
                await stream.append(word + " ")
                await asyncio.sleep(0.01)
            await stream.close()
            assert (await reader).sentences == WHOLE
        assert len(server.opened) >= 2 and {(opened.session, opened.target) for opened in server.opened[1:]} == {("long", "de")}

    run(work, retry=Retry(tries=100, first_delay=0.01, max_delay=0.1))


def test_a_break_before_anything_was_said_and_refusals() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        async with client.stream() as stream:
            assert (await by_words(stream, TEXT)).sentences == WHOLE
        server.script.refusals = [(grpc.StatusCode.NOT_FOUND, None)]
        with pytest.raises(ServiceError, match="not now"):
            async with client.stream():
                pass
        server.script.drop_behind_request = [2] * 99
        with pytest.raises(ServiceError, match="broken by the script"):  # tries end where nothing is committed
            async with client.stream() as stream:
                await by_words(stream, TEXT, 0.001)

    run(work, Script(drop_behind_request=[1, 2, 1], refusals=[(grpc.StatusCode.RESOURCE_EXHAUSTED, 5), (grpc.StatusCode.UNAVAILABLE, None)]))


def test_what_was_taken_is_told_and_what_was_not_is_joined() -> None:
    """Whoever takes nothing holds nothing up; then they get each sentence at once."""

    async def work(server: FakeServer, client: AsyncClient) -> None:
        async with client.stream() as stream:
            for number in range(200):
                await stream.append(f"word {number}. " if number % 50 == 49 else "word ")
                await asyncio.sleep(0)
            while len(stream.source) > 1:
                await asyncio.sleep(0.001)
            assert server.requests[0][-1].ack_revision == 0
            updates = [await anext(stream) for _ in range(4)]
            assert [(update.segment, update.final, update.revision) for update in updates] == [(n, True, n + 1) for n in range(4)]
            assert updates[3].committed == "WORD " * 49 + "WORD 199."
            while server.unacknowledged:
                await asyncio.sleep(0.001)

    run(work)


def test_a_reader_that_pauses_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvmk.serving.client.stream.PATIENCE", 0.02)

    async def work(server: FakeServer, client: AsyncClient) -> None:
        async with client.stream() as stream:
            await stream.append("one two ")
            while len(server.requests[0]) < 3:
                await asyncio.sleep(0.001)
            assert server.requests[0][-1].ack_revision == 1 and (await anext(stream)).tentative == "ONE TWO"

    run(work)


def test_a_stream_that_the_server_ended_because_nothing_was_said() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        async with client.stream() as stream:
            reader = asyncio.create_task(Reader().take_all(stream))
            await stream.append("One two. Three fo")
            while server.ended < 1:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert len(server.opened) == 1 and stream.connected and not reader.done()
            await stream.append("ur. Five")
            await stream.close()
            assert (await reader).sentences == ["ONE TWO.", "THREE FOUR.", "FIVE"]
        assert len(server.opened) == 2

    run(work, Script(idle=0.05))


def test_a_client_that_is_closed_ends_a_stream_that_sleeps() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        async with client.stream() as stream:
            await stream.append("One two. Three fo")
            while server.ended < 1:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            reader = asyncio.create_task(Reader().take_all(stream))
            await asyncio.sleep(0.01)
            assert not reader.done()
            await client.close()
            with pytest.raises(ServiceError, match="the client was closed"):
                await asyncio.wait_for(reader, 5)

    run(work, Script(idle=0.05))


def test_memory_is_that_of_the_open_sentence() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        longest = 0
        async with client.stream() as stream:
            reader = asyncio.create_task(Reader().take_all(stream))
            for _ in range(40):
                await stream.append("All these words are one more sentence of a text. " * 10 + "And a long one that goes on and on, " * 500 + "to an end. ")
                longest = max(longest, len(stream.source))
                await asyncio.sleep(0)
            await stream.close()
            assert len((await reader).sentences) == 440
        assert longest < 300_000 and max(len(request.append.text) for request in server.requests[0]) <= 8192

    run(work)


def test_leaving_cancels() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        async with client.stream() as stream:
            await stream.append("one two ")
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        while server.ended < 1:
            await asyncio.sleep(0.001)
        stall = server.script.stall = asyncio.Event()
        for work in (client.translate("a"), client.stream().__aenter__()):
            task = asyncio.create_task(work)  # type: ignore[arg-type]
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        stall.set()
        assert (await client.translate("b")).text == "B"

    run(work)


def test_a_client_that_is_closed_ends_its_streams() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        async with client.stream() as stream:
            await stream.append("one two ")
            await anext(stream)
            await client.close()
            for _ in range(2):
                with pytest.raises(ServiceError, match="the client was closed") as caught:
                    await anext(stream)
                assert caught.value.status is Status.CANCELLED
            with pytest.raises(ServiceError):
                await stream.append("three")

    run(work)


# What has been written is changed


def test_replacing() -> None:
    async def work(server: FakeServer, client: AsyncClient) -> None:
        async with client.stream() as stream:
            reader = asyncio.create_task(Reader().take_all(stream))
            await stream.append("we want a ")
            await asyncio.sleep(0.02)
            await stream.replace(3, "need a table")
            await stream.append(". And")
            while stream.begin == 0:
                await asyncio.sleep(0.001)
            assert stream.source in (" And", "And")
            with pytest.raises(ValueError, match="the text from character 16 to 20 can be replaced, and not from 3 on"):
                await stream.replace(3, "x")
            with pytest.raises(ValueError, match="not from 21 on"):
                await stream.replace(21, "x")
            await stream.replace(17, "Thanks")
            await stream.end_segment()
            await stream.end_segment()
            with pytest.raises(ValueError, match="from character 23 to 23"):
                await stream.replace(17, "x")
            await stream.append(" bye")
            await stream.close()
            assert (await reader).sentences == ["WE NEED A TABLE.", "THANKS", "BYE"]
        assert any(request.WhichOneof("event") == "replace" for request in server.requests[0])

    run(work)


def test_a_sentence_that_ends_while_it_is_replaced() -> None:
    """The replacement reaches the server behind the sentence's end: what goes beyond the end counts."""

    async def work(server: FakeServer, client: AsyncClient) -> None:
        async with client.stream() as stream:
            reader = asyncio.create_task(Reader().take_all(stream))
            await stream.append("One two. Thr")
            await asyncio.sleep(0.01)  # sent, and not read yet
            await stream.replace(4, "2. Three")
            await stream.close()
            assert (await reader).sentences == ["ONE TWO.", "HREE"]
        assert len(server.opened) == 2 and server.opened[1].first_segment == 1

    run(work, Script(late=0.05))


@pytest.mark.parametrize("seed", range(12))
def test_texts_that_are_changed_at_random(seed: int) -> None:
    """With changes, ends and breaks anywhere, the sentences are those of the text as it was in the end: it is changed behind its last end only."""
    chances = random.Random(seed)

    async def work(server: FakeServer, client: AsyncClient) -> None:
        ends, whole = [0], ""
        async with client.stream() as stream:
            reader = asyncio.create_task(Reader().take_all(stream))
            for _ in range(60):
                match chances.randrange(6):
                    case 0 if len(whole) > ends[-1]:
                        place = chances.randint(ends[-1], len(whole))
                        whole = whole[:place] + "new "
                        await stream.replace(place, "new ")
                    case 1 if whole[ends[-1] :].strip():
                        ends.append(len(whole))
                        await stream.end_segment()
                    case _:
                        word = chances.choice(["a ", "word ", "longer ", "ü"])
                        whole += word
                        await stream.append(word)
                await asyncio.sleep(chances.choice([0, 0, 0.001, 0.002]))
            await stream.close()
            sentences = [whole[begin:end].strip().upper() for begin, end in zip(ends, [*ends[1:], len(whole)], strict=True)]
            assert (await reader).sentences == [sentence for sentence in sentences if sentence]

    places = [chances.randint(1, 15) for _ in range(4)]
    run(work, Script(drop_behind_request=places, late=chances.choice([0, 0.001])))


# Who asks


def test_a_token_is_sent_and_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    token = "s3cret-token"

    async def work(server: FakeServer, client: AsyncClient) -> None:
        await client.stats()
        async with client.stream() as stream:
            await by_words(stream, TEXT)
            assert token not in repr(stream) + repr(client) + str(vars(client))
        assert {metadata["authorization"] for metadata in server.metadata} == {f"Bearer {token}"}
        server.script.refusals = [(grpc.StatusCode.PERMISSION_DENIED, None)]
        with pytest.raises(ServiceError) as caught:
            await client.stats()
        assert token not in str(caught.value) + repr(caught.value)

    with caplog.at_level(logging.DEBUG):
        run(work, Script(drop_behind_request=[4]), token=token)
    assert token not in caplog.text
    for wrong in ("", "two words", "line\n", "gülden"):
        with pytest.raises(ConfigError, match="the token is empty or has characters") as caught:
            AsyncClient(token=wrong)
        assert not wrong or wrong not in str(caught.value)


def test_tls(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("the command openssl makes the certificates")
    ours, other = certificates.authority(tmp_path, "ours"), certificates.authority(tmp_path, "other")
    server, mine = certificates.signed(tmp_path, "server", ours, names="DNS:there"), certificates.signed(tmp_path, "mine", ours, names="DNS:me")
    read = grpc.ssl_server_credentials([(server.key.read_bytes(), server.certificate.read_bytes())], ours.certificate.read_bytes(), True)
    good = {"authority": str(ours.certificate), "certificate": str(mine.certificate), "private_key": str(mine.key), "server_name": "there"}

    async def ask(address: str, tls: Tls | None) -> str:
        async with AsyncClient(address, tls=tls, retry=Retry(tries=1), timeout=10) as client:
            try:
                return (await client.translate("a")).text
            except NoServerError as error:
                return str(error)

    async def both() -> None:
        async with FakeServer(credentials=read) as fake:
            assert await ask(fake.address, Tls(**good)) == "A"
            cases: list[tuple[dict[str, Any], str]] = [
                ({"authority": str(other.certificate)}, "not signed by an authority that is trusted"), ({"authority": None}, "not signed by an authority"),
                ({"server_name": None}, "is of another name"), ({"certificate": None, "private_key": None}, "may want TLS, or a certificate"),
            ]  # fmt: skip
            for wrong, reason in cases:
                assert reason in await ask(fake.address, Tls(**{**good, **wrong}))
            assert "may want TLS" in await ask(fake.address, None)
        async with FakeServer() as fake:
            assert "it speaks without TLS" in await ask(fake.address, Tls())

    asyncio.run(both())
    with pytest.raises(ConfigError, match="certificate and private_key go together"):
        Tls(certificate="x")
    with pytest.raises(DataError, match=r"nowhere\.pem"):
        AsyncClient(tls=Tls(authority=str(tmp_path / "nowhere.pem")))
    (tmp_path / "text").write_text("text", encoding="ascii")
    with pytest.raises(ConfigError, match="authority: .*text is no PEM file"):
        AsyncClient(tls=Tls(authority=str(tmp_path / "text")))


# Without an event loop


def test_client_in_threads() -> None:
    with InThread(Script(drop_before_response=[3, 5])) as server, Client(server.address, retry=QUICK) as client:
        found: list[Any] = []

        def whole(number: int) -> None:
            texts = [f"text {number} {index}" for index in range(20)]
            found.append([client.translate(text).text for text in texts] == [text.upper() for text in texts])

        def stream() -> None:
            with client.stream() as live:
                reader = Reader()
                for word in TEXT.split(" "):
                    live.append(word + " ")
                    if (update := live.poll(0.001)) is not None:
                        reader.take(update)
                live.close()
                for update in live:
                    reader.take(update)
                assert live.poll(0.01) is None
            found.append(reader.sentences == WHOLE)

        threads = [threading.Thread(target=whole, args=(number,)) for number in range(3)] + [threading.Thread(target=stream) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert found == [True] * 6
        assert [each.code for each in client.detect("x")] == ["en", "de"] and client.models()[0].name == "capitals" and client.stats().translations == 60
        with client.stream(session="name") as live:
            assert (live.session, live.model, live.target, live.connected, live.begin, live.source) == ("name", "capitals", "de", True, 0, "")
            live.append("one tow")
            live.replace(4, "two")
            live.end_segment()
            assert next(iter(live)).committed in ("", "ONE TWO") and "name" in repr(live)
        assert repr(client) == f"Client({server.address!r})"
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.stats()


def test_importing_the_package_imports_no_grpc() -> None:
    code = "import sys, cvmk.serving\nfrom cvmk.cli import _parser\n_parser()\n"
    code += "print([name for name in ('grpc', 'google.protobuf', 'asyncio', 'torch') if name in sys.modules])"
    assert said(code).strip() == "[]"
    assert said("import sys, cvmk.serving\nprint(cvmk.serving.Client, 'torch' in sys.modules)").endswith("False\n")
