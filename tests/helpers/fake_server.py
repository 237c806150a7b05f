"""A server of the protocol that translates by writing capitals, and fails when it is told to.

A sentence ends at a full stop, and the next one begins behind the spaces there; whole words of one that has not ended are tentative. `Script` says what
goes wrong. It runs in the event loop of the test, on a port that stays its own while it is stopped.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from cvmk.serving import messages

_SENTENCE = re.compile(r"[^.]*\.")


@dataclass
class Script:
    """What goes wrong, counted over all streams of the server."""

    drop_before_response: list[int] = field(default_factory=list)
    """The connection breaks before the n-th response of a stream, once for each number, a stream each."""
    drop_behind_request: list[int] = field(default_factory=list)
    """The connection breaks behind the n-th request of a stream, likewise."""
    refusals: list[tuple[grpc.StatusCode, int | None]] = field(default_factory=list)
    """Calls are refused with these, first to last, and hints of so many milliseconds."""
    commit_words: bool = False
    """Whether words are committed as soon as they are known."""
    stall: asyncio.Event | None = None
    """Nothing is answered before it is set."""
    idle: float | None = None
    """Seconds after which the first stream ends because nothing was said."""
    late: float = 0.0
    """Seconds that a request waits before it is read."""


class FakeServer:
    def __init__(self, script: Script | None = None, **server: Any) -> None:
        self.script, self._options = script or Script(), server
        self.opened: list[Any] = []
        self.requests: list[list[Any]] = []
        self.metadata: list[dict[str, Any]] = []
        self.texts = 0
        self.unacknowledged = 0
        self.ended = 0
        self.address = ""
        self._server: Any = None

    async def __aenter__(self) -> FakeServer:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        methods = {
            "Translate": self._unary("Translate", self._translate),
            "Detect": self._unary("Detect", self._detect),
            "ListModels": self._unary("ListModels", self._models),
            "GetStats": self._unary("GetStats", self._stats),
            "TranslateStream": grpc.stream_stream_rpc_method_handler(
                self._stream, messages.StreamRequest.FromString, messages.StreamResponse.SerializeToString
            ),
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(messages.SERVICE, methods)])
        wanted = self.address or "127.0.0.1:0"
        credentials = self._options.get("credentials")
        port = self._server.add_secure_port(wanted, credentials) if credentials else self._server.add_insecure_port(wanted)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def _unary(self, name: str, answer: Callable[[Any], Any]) -> Any:
        async def handle(request: Any, context: Any) -> Any:
            await self._admit(context)
            return answer(request)

        method = messages.services()[messages.SERVICE][name]
        kinds = getattr(messages, method.input_type.name), getattr(messages, method.output_type.name)
        return grpc.unary_unary_rpc_method_handler(handle, kinds[0].FromString, kinds[1].SerializeToString)

    async def _admit(self, context: Any) -> None:
        self.metadata.append(dict(context.invocation_metadata()))
        if self.script.refusals:
            code, hint = self.script.refusals.pop(0)
            await context.abort(code, "not now", () if hint is None else (("retry-after-ms", str(hint)),))
        if self.script.stall is not None:
            await self.script.stall.wait()

    def _translate(self, request: Any) -> Any:
        self.texts += len(request.texts)
        found = [
            messages.TranslatedText(text=text.decode().upper().encode(), score=-1, language=messages.Language(code="en", probability=1))
            for text in request.texts
        ]
        return messages.TranslateResponse(translations=found, model="capitals")

    def _detect(self, request: Any) -> Any:
        languages = [messages.Language(code="en", probability=0.75), messages.Language(code="de", probability=0.25)]
        return messages.DetectResponse(detections=[messages.Detection(languages=languages) for _ in request.texts])

    def _models(self, request: Any) -> Any:
        return messages.ListModelsResponse(
            models=[messages.Model(name="capitals", source="en", target="de", version="1", compute_type="int8", max_length=64, state="ready")]
        )

    def _stats(self, request: Any) -> Any:
        return messages.GetStatsResponse(sessions=2, translations=self.texts, uptime_s=1.5)

    async def _stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await self._admit(context)
        seen: list[Any] = []
        self.requests.append(seen)
        session = _Session(self.script.commit_words)
        break_at_request = self.script.drop_behind_request.pop(0) if self.script.drop_behind_request else 0
        break_at_response = self.script.drop_before_response.pop(0) if self.script.drop_before_response else 0
        sent = 0
        context.add_done_callback(self._end)
        idle, self.script.idle = self.script.idle, None
        while True:
            try:
                async with asyncio.timeout(idle):
                    request = await anext(requests, None)
            except TimeoutError:
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "nothing was said")
            if request is None:
                return
            await asyncio.sleep(self.script.late)
            seen.append(request)
            if len(seen) == break_at_request:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the script")
            if request.WhichOneof("event") == "open":
                self.opened.append(request.open)
                session.open(request.open)
                yield messages.StreamResponse(opened=messages.Opened(session=request.open.session or f"s{len(self.opened)}", model="capitals", target="de"))
                continue
            for response in session.read(request):
                sent += 1
                if sent == break_at_response:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the script")
                yield response
            self.unacknowledged = session.revision - session.acknowledged
            if session.closed:
                return

    def _end(self, context: Any) -> None:
        self.ended += 1


class InThread:
    """A fake server with an event loop in a thread of its own."""

    def __init__(self, script: Script | None = None) -> None:
        self.server, self._loop = FakeServer(script), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.server.start(), self._loop).result(10)
        return self.server

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


class _Session:
    """One stream's text, on the server's side."""

    def __init__(self, commit_words: bool) -> None:
        self.revision = self.acknowledged = self.segment = self.begin = self.seq = 0
        self.text, self.committed, self.tentative = "", "", ""
        self.commit_words, self.closed = commit_words, False

    def open(self, request: Any) -> None:
        self.segment, self.committed = request.first_segment, request.committed.decode()
        assert list(request.committed_pieces) == _pieces(self.committed)

    def read(self, request: Any) -> list[Any]:
        assert request.ack_revision <= self.revision
        self.acknowledged = max(self.acknowledged, request.ack_revision)
        match request.WhichOneof("event"):
            case "append":
                self._count(request.append.seq)
                self.text += request.append.text.decode()
            case "replace":
                self._count(request.replace.seq)
                if request.replace.segment != self.segment or request.replace.from_char > len(self.text):
                    self.revision += 1
                    refused = messages.Refused(seq=self.seq, reason="the sentence has ended")
                    return [messages.StreamResponse(segment=self.segment, revision=self.revision, seq_read=self.seq, segment_begin=self.begin, refused=refused)]
                self.text = self.text[: request.replace.from_char] + request.replace.text.decode()
            case "end_segment":
                return list(self._sentences()) + self._end(len(self.text), len(self.text))
            case "close":
                self.closed = True
                return list(self._sentences()) + self._end(len(self.text), len(self.text))
        return [*self._sentences(), *self._tentative()]

    def _count(self, seq: int) -> None:
        self.seq += 1
        assert seq == self.seq, "a gap"

    def _sentences(self) -> list[Any]:
        found = []
        while (sentence := _SENTENCE.match(self.text)) is not None:
            rest = self.text[sentence.end() :]
            found += self._end(sentence.end(), sentence.end() + len(rest) - len(rest.lstrip(" ")))
        return found

    def _end(self, end: int, begin: int) -> list[Any]:
        text = self.text[:end]
        if not text.strip():
            return []
        whole = text.strip().upper()
        assert whole.startswith(self.committed), f"{self.committed!r} was committed of {whole!r}"
        response = self._say(whole[len(self.committed) :], "", end, final=True)
        self.text = self.text[begin:]
        self.begin += begin
        self.segment += 1
        self.committed = ""
        return [response]

    def _tentative(self) -> list[Any]:
        words = self.text[: self.text.rfind(" ") + 1].rstrip()
        shown = words.strip().upper()
        if self.commit_words:
            return [self._say(shown[len(self.committed) :], "", len(words), final=False)] if shown[len(self.committed) :] else []
        tentative = shown[len(self.committed) :]
        return [self._say("", tentative, len(words), final=False)] if tentative != self.tentative else []

    def _say(self, committed: str, tentative: str, read: int, *, final: bool) -> Any:
        before, now = self.committed + self.tentative, self.committed + committed + tentative
        common = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))
        self.revision += 1
        self.committed += committed
        self.tentative = tentative
        return messages.StreamResponse(
            segment=self.segment, revision=self.revision, committed_delta=committed.encode(), tentative=tentative.encode(), deleted_chars=len(before) - common,
            source_chars_read=self.begin + read, final=final, seq_read=self.seq, segment_begin=self.begin,
            committed_pieces=[] if final else _pieces(committed),
        )  # fmt: skip


def _pieces(text: str) -> list[int]:
    """A piece a character."""
    return [ord(character) for character in text]
