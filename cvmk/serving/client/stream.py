"""A live stream: one sequence of updates, over as many connections as it takes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Self

import grpc
import grpc.aio

from cvmk.serving import messages
from cvmk.serving.answers import Language
from cvmk.serving.client.channel import Connection
from cvmk.serving.client.outgoing import Outgoing, StartAnewError
from cvmk.serving.client.requests import utf8
from cvmk.serving.client.retry import Deadline
from cvmk.serving.client.unread import LiveUpdate, Unread
from cvmk.serving.errors import ServiceError, Status

log = logging.getLogger(__name__)

KEPT = 1 << 18
"""Characters without a final translation above which a stream waits before it takes more."""
PATIENCE = 10.0
"""Seconds after which the server is told that an update was read which nobody has taken: it would take the stream for dead."""


class AsyncLiveStream:
    """A text that grows, and its translation. `AsyncClient.stream` makes it.

        async with client.stream(source="en", target="de") as stream:
            await stream.append("We need a table. ")
            await stream.close()
            async for update in stream:
                print(update.committed, update.tentative)

    Entering waits for the server, and raises ServiceError where it refuses. Updates are taken by one task, while others may write. Where the connection is
    lost another one is made, and goes on with the text that had no final translation: what was committed comes once, and `revision` and `source_read` count
    over all connections. Leaving cancels what has not been translated.

    Positions count the characters of the whole text. `append` waits where very much text has no final translation, and so does the server's answer where
    very much of it has not been taken: who sends a long text takes updates at the same time. After a failure, what came before it can still be taken; then
    `append` and the iterator raise ServiceError.
    """

    def __init__(self, connection: Connection, opening: Any, timeout: float | None) -> None:
        self._connection, self._opening, self._timeout = connection, opening, timeout
        self._text, self._unread = Outgoing(), Unread()
        self._segment, self._committed, self._pieces = int(opening.first_segment), "", list[int]()
        self._number = 0  # of the connection; then its last revision that came, that was taken, and that the server knows to be
        self._received = self._read = self._acknowledged = 0
        self._work, self._news, self._room = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._unread_since = 0.0
        self._task: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self._over = self._progress = self._anew = False
        self.connected = False
        self.session, self.model, self.target = "", "", ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.session!r} at {self._connection.address!r})"

    async def __aenter__(self) -> Self:
        if self._task is not None:
            raise RuntimeError("a stream is entered once: ask the client for another one")
        self._task = asyncio.create_task(self._run())
        try:
            while not (self.connected or self._over):
                await self._wait(self._news)
        except BaseException:
            await self.__aexit__()
            raise
        if self._error is not None and not self.connected:
            raise self._error
        return self

    async def __aexit__(self, *error: object) -> None:
        self._text.closed = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    # -- the text ---------------------------------------------------------------------------------------------------------------------
    @property
    def source(self) -> str:
        """The text that has no final translation yet."""
        return self._text.text

    @property
    def begin(self) -> int:
        """The character of the whole text where that begins."""
        return self._text.begin

    async def append(self, text: str) -> None:
        """More of the text. Raises RuntimeError for a closed stream, TypeError for what is no string, ServiceError."""
        self._check()
        utf8(text, "text")
        self._text.append(text)
        await self._written()

    async def replace(self, from_char: int, text: str) -> None:
        """`text` instead of everything from character `from_char` of the whole text on. What has been committed stays. Raises ValueError for a place
        before `begin`, whose sentence has ended, or behind the text; else as `append`. Where the sentence ends on the server at the same time, what goes
        beyond its end counts."""
        self._check()
        utf8(text, "text")
        self._text.replace(from_char, text)
        await self._written()

    async def end_segment(self) -> None:
        """The sentence ends here, whatever it ends with."""
        self._check()
        self._text.end_segment()
        await self._written()

    async def close(self) -> None:
        """The text ends here. The iterator goes on until all of it is translated."""
        self._text.closed = True
        self._work.set()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._task is None:
            raise RuntimeError("the stream is not open: enter it by `async with`")
        if self._text.closed:
            raise RuntimeError("the stream is closed: ask the client for another one")

    async def _written(self) -> None:
        self._work.set()
        while len(self._text.text) > KEPT and not self._over:
            await self._wait(self._room)
        if self._error is not None:
            raise self._error

    @staticmethod
    async def _wait(event: asyncio.Event) -> None:
        event.clear()
        await event.wait()

    # -- the updates ------------------------------------------------------------------------------------------------------------------
    def __aiter__(self) -> AsyncIterator[LiveUpdate]:
        return self

    async def __anext__(self) -> LiveUpdate:
        while (update := self._take()) is None:
            if self._error is not None:
                raise self._error
            if self._over:
                raise StopAsyncIteration
            await self._wait(self._news)
        return update

    def _take(self) -> LiveUpdate | None:
        taken = self._unread.take()
        if taken is None:
            return None
        update, connection, revision = taken
        if connection == self._number:
            self._read = revision
            self._work.set()
        self._room.set()
        return update

    # -- the connections --------------------------------------------------------------------------------------------------------------
    async def _run(self) -> None:
        try:
            await self._converse_until_the_end()
        except Exception as error:
            self._error = error
        finally:
            self._over = True
            for event in (self._news, self._room):
                event.set()

    async def _converse_until_the_end(self) -> None:
        deadline, failures = Deadline(self._timeout), 0
        while True:
            began, self._progress = time.monotonic(), False
            try:
                return await self._converse(deadline)
            except StartAnewError:
                continue
            except ServiceError as error:
                failed = error
            finally:
                self.connected = False
            idle = failed.status is Status.DEADLINE_EXCEEDED and self._timeout is None
            if idle:
                await self._sleep()
            if self._connection.closed:
                raise ServiceError(Status.CANCELLED, "the client was closed while the stream was open")
            if idle:
                failures = 0
                continue
            lasted = time.monotonic() - began
            failures = 1 if self._progress or lasted > self._connection.retry.max_delay else failures + 1
            log.info("stream %s: %s (%s)", self.session, failed, failed.status.name)
            self._news.set()
            await self._connection.retry.pause(failures, failed, deadline)

    async def _sleep(self) -> None:
        """The server ends streams on which nothing is said for long. There will be another one when there is something to say."""
        self.connected = True
        self._connection.sleepers.add(self._work)
        try:
            while not (self._text.pending or self._connection.closed):
                await self._wait(self._work)
        finally:
            self._connection.sleepers.discard(self._work)

    async def _converse(self, deadline: Deadline) -> None:
        """One connection. Returns at the end of the text. Raises ServiceError where it fails, StartAnewError where there must be another one."""
        self._text.connect(self._segment)
        self._number += 1
        self._received = self._read = self._acknowledged = 0
        self._anew = False
        call = self._connection.converse("TranslateStream", deadline.left())
        writer = asyncio.create_task(self._write(call))
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                self._receive(response)
                while self._unread.full:
                    await self._wait(self._room)
            if not self._text.close_sent:
                raise ServiceError(Status.UNAVAILABLE, "the server ended the stream before the text had ended")
        except grpc.aio.AioRpcError as error:
            raise self._connection.explained(error) from None
        except asyncio.CancelledError:
            failed = self._connection.cut()
            raise (StartAnewError() if self._anew else failed) from None
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            call.cancel()

    async def _write(self, call: Any) -> None:
        """Says what there is to say; what becomes of the call, its reader sees."""
        opening = self._opening
        opening.first_segment, opening.committed, opening.committed_pieces[:] = self._segment, self._committed.encode(), self._pieces
        try:
            await call.write(messages.StreamRequest(open=opening))
            while not self._text.close_sent:  # then nothing waits for an acknowledgement, and a message to a call that has ended would hide how it ended
                if self._received > self._read and time.monotonic() - self._unread_since > PATIENCE:
                    self._read = self._received
                request = self._text.next_request()
                if request is None and self._acknowledged == self._read:
                    try:
                        async with asyncio.timeout(PATIENCE):
                            await self._wait(self._work)
                    except TimeoutError:
                        self._read = self._received
                    continue
                self._acknowledged = self._read
                request = request or messages.StreamRequest()
                request.ack_revision = self._acknowledged
                await call.write(request)
        except StartAnewError:
            self._anew = True
            call.cancel()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            pass

    def _receive(self, response: Any) -> None:
        """Raises StartAnewError where a sentence had ended that was to be changed."""
        if response.HasField("opened"):
            opened, self.connected = response.opened, True
            self.session, self.model, self.target = opened.session, opened.model, opened.target
            self._opening.session, self._opening.target = opened.session, opened.target
        elif response.HasField("refused"):
            raise StartAnewError
        elif response.revision:
            self._update(response)
        self._news.set()

    def _update(self, response: Any) -> None:
        committed = response.committed_delta.decode(errors="replace")
        language = Language(response.language.code, response.language.probability) if response.language.code else None
        base, timing = self._text.base, response.timing
        update = LiveUpdate(
            segment=response.segment, revision=response.revision, committed=committed, tentative=response.tentative.decode(errors="replace"),
            deleted=response.deleted_chars, source_read=base + response.source_chars_read, final=response.final, language=language,
            queue_us=timing.queue_us, decode_us=timing.decode_us, begin=base + response.segment_begin,
        )  # fmt: skip
        if self._received == self._read:
            self._unread_since = time.monotonic()
        self._received = response.revision
        self._unread.put(update, self._number)
        if response.final:
            self._segment, self._committed, self._pieces = response.segment + 1, "", []
            self._text.ended(response.source_chars_read)
            self._room.set()
        else:
            self._committed += committed
            self._pieces += response.committed_pieces
            self._text.goes_on(response.segment, response.segment_begin)
        self._progress |= response.final or committed != ""
