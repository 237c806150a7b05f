"""A live stream of a client, whatever the transport: events come in at any time, updates go out as fast as they are read."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Self

from cvmk.errors import ConfigError
from cvmk.inference.options import SearchOptions
from cvmk.inference.translator import Translation, Translator
from cvmk.serving import logs
from cvmk.serving.detection import AUTO, Sticky
from cvmk.serving.errors import ServiceError, Status, internal, invalid
from cvmk.serving.events import CREDIT, Event, Events, Opening
from cvmk.serving.metrics import LIVE, Metrics
from cvmk.serving.models import Models, Served
from cvmk.serving.outbox import Outbox, Refused, SessionUpdate
from cvmk.serving.scheduler import Turn, cost
from cvmk.streaming import Sentences, StreamCore, Update, Wanted

_CHECKS = 0.5
"""Seconds between two looks at a stream's reader."""
_LATER = 1.0
"""Seconds after which a stream may come again whose translations were too slow."""
_UNDECIDED = 2048
"""Characters of a sentence after which its language is guessed, whatever they are."""


@dataclass(frozen=True)
class Rules:
    """Of `[limits]`, what a stream keeps to: characters that may wait to be translated, and to be read; seconds."""

    text: int
    unread: int
    stuck: float
    idle: float
    request: float


class LiveSession:
    """A stream. Events do not wait: they raise ServiceError for what is wrong with them, and are worked on as the model allows, all that came in the meantime
    together. `next` gives what the reader may be sent. Used inside `async with`, in one event loop, by one reader."""

    def __init__(
        self,
        models: Models,
        client: str,
        opening: Opening,
        rules: Rules,
        language: Sticky,
        metrics: Metrics,
        *,
        ended: Callable[[LiveSession], None] = lambda session: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = opening.session or secrets.token_hex(8)
        self._models, self._client, self._opening, self._rules = models, client, opening, rules
        self._sticky, self._ended, self._clock = language, ended, clock
        self._language = language.language
        self._metrics = metrics
        self._served: Served | None = None
        self._state: Any = None
        self._state_of = 0
        self._events = Events(rules.text, clock)
        self._seq_read = 0
        self._handing_over = self._busy = False
        self._ready = asyncio.Event()
        self.outbox = Outbox(opening.credit or CREDIT, clock)
        self.error: ServiceError | None = None
        self.on_failure: Callable[[], object] = lambda: None
        """Called when the session has failed, once: for a transport that may be waiting for its reader."""
        self._worker: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._queue_us = self._decode_us = 0  # of the last translation
        try:
            self._core = StreamCore(
                self._next_model, opening.policy, Sentences(), whole_words=not opening.partial_words,
                segment=opening.first_segment,
            )  # fmt: skip
            self._resumes = opening.committed != ""
            if self._language is not None:
                self._resume()
        except ServiceError:
            self._release()
            raise
        self._core.sentences = Sentences(self._source_language())

    # -- what a transport does ---------------------------------------------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        with logs.session(self.name):
            self._worker = loop.create_task(self._work(), name=f"cvmk session {self.name}")
        self._watch = loop.call_later(_CHECKS, self._look)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._worker is not None:
            self._worker.cancel()
        try:
            if self._worker is not None:
                await asyncio.gather(self._worker, return_exceptions=True)
        finally:
            self._release()
            self._ended(self)

    @property
    def model(self) -> str:
        """The name of the model that translates its present sentence."""
        return self._served.info.name if self._served is not None else ""

    @property
    def target(self) -> str:
        """The language that it is translated to."""
        return self._served.info.target if self._served is not None else ""

    def append(self, seq: int, text: str) -> None:
        """More of the text."""
        self._events.put("append", Event(seq, text))

    def replace(self, seq: int, from_char: int, text: str, segment: int | None = None) -> None:
        """`text` instead of everything from a character of the sentence that has not ended. Where that is not `segment` any more, or has fewer characters, an
        update says that it was refused."""
        self._events.put("replace", Event(seq, text, begin=from_char, segment=segment))

    def end_segment(self) -> None:
        """The sentence ends here."""
        self._events.put("end_segment", Event(self._events.seq, ends=True))

    def close(self) -> None:
        """The text ends here. Nothing may come after it, and `next` ends with what was still to be said."""
        self._events.put("close", Event(self._events.seq, ends=True, closes=True))
        self._events.closed = True

    def acknowledge(self, revision: int) -> None:
        """The reader has read this revision; 0 says nothing."""
        self._events.heard = self._clock()
        if revision:
            self.outbox.acknowledge(revision)
            self._ready.set()

    async def room(self) -> None:
        """Waits while too much text waits to be translated. A transport reads on after it."""
        await self._events.room.wait()

    async def next(self) -> SessionUpdate | None:
        """The next thing to send; None when all has been said. Raises ServiceError where the session has failed: what was committed before is said first."""
        while True:
            if (update := self.outbox.take()) is not None:
                self._count(update)
                return update
            if self.error is not None:
                raise self.error
            if self.outbox.empty and self._worker is not None and self._worker.done():
                return None
            self._ready.clear()
            await self._ready.wait()

    def _count(self, update: SessionUpdate) -> None:
        self._metrics.said(self.model, len(update.committed), update.deleted)
        arrived = self._events.answered(update.seq_read)
        if arrived is not None and not update.refused:
            self._metrics.first_text(self.model, self._clock() - arrived)
        if self.outbox.conflated:
            self._metrics.conflated(self.outbox.conflated)
            self.outbox.conflated = 0

    def hand_over(self) -> None:
        """End with UNAVAILABLE as soon as all that has come was translated and said: the client goes on elsewhere."""
        self._handing_over = True
        self._events.wake.set()

    def fail(self, error: ServiceError) -> None:
        """End with an error; the first one counts."""
        if self.error is None:
            self.error = error
            self._ready.set()
            self._events.room.set()
            self.on_failure()

    # -- events ------------------------------------------------------------------------------------------------------------------------
    def _apply(self) -> tuple[bool, bool]:
        """Bring the pending events into the text, up to the first that ends a sentence; whether one did, and whether the text ends."""
        while self._events:
            event = self._apply_one()
            if event.ends:
                return True, event.closes
        return False, False

    def _apply_one(self) -> Event:
        event = self._events.take()
        if event.ends:
            return event
        self._seq_read = event.seq
        if event.begin is None:
            self._core.append(event.text)
        elif event.segment not in (None, self._core.segment):
            self._refuse(event.seq, f"sentence {event.segment} has ended: it has been translated")
        else:
            try:
                self._core.replace(event.begin, event.text)
            except ValueError as error:
                self._refuse(event.seq, str(error))
        return event

    def _refuse(self, seq: int, reason: str) -> None:
        core = self._core
        self._put(SessionUpdate(core.segment, source_read=core.begin, segment_begin=core.begin, seq_read=seq, refused=Refused(seq, reason)))

    # -- the work ----------------------------------------------------------------------------------------------------------------------
    async def _work(self) -> None:
        try:
            while True:
                await self._events.wake.wait()
                self._events.wake.clear()
                closes = False
                while self._events and not closes:
                    ends, closes = self._apply()
                    self._busy = True
                    if self._known(ends):
                        await self._advance(ends)
                    self._busy = False
                    await asyncio.sleep(0)  # whatever comes of the text, others have their turn
                if closes:
                    return
                if self._handing_over and not self._events:
                    raise ServiceError(Status.UNAVAILABLE, "the server is draining: connect again, and resend what was not committed", reason="draining")
        except ServiceError as error:
            self.fail(error)
        except Exception:
            self.fail(internal("a session"))
        finally:
            self._ready.set()

    async def _advance(self, ends: bool) -> None:
        """Everything that is due."""
        steps = self._core.advance(end=ends)
        answer: Translation | None = None
        with contextlib.suppress(StopIteration):
            while True:
                step = steps.send(answer)
                answer = None
                if isinstance(step, Update):
                    self._say(step)
                elif step.final:
                    answer = await self._translate_end(step)
                else:  # always the last one
                    steps.close()
                    await self._translate_newest(step)
                    return

    async def _translate_end(self, wanted: Wanted) -> Translation:
        """Of a sentence that has ended, which has to be said: where the queues are full, it is tried again."""
        served = self._served
        assert served is not None
        source, options = served.translator.encode(wanted.source), self._options(served)
        wait, until = 0.05, self._clock() + self._rules.stuck
        while source:
            try:
                async with self._turn(served, cost(source, options)) as turn:
                    return await self._search(turn, served, wanted, source, options)
            except ServiceError as error:
                if error.status is Status.DEADLINE_EXCEEDED:  # of ours, not of the client's
                    raise ServiceError(Status.UNAVAILABLE, f"{error}: try again later", retry_after=_LATER) from error
                if error.status is not Status.RESOURCE_EXHAUSTED or self._clock() > until:
                    raise
                await asyncio.sleep(max(wait, min(error.retry_after or 0.0, 1.0)))
                wait = min(2 * wait, 1.0)
        return served.translator.decode([])

    async def _translate_newest(self, wanted: Wanted) -> None:
        """Of a sentence that goes on: waits for its turn, and translates what the sentence is by then. Where the queues are full it is left for later."""
        served = self._served
        assert served is not None
        options = self._options(served)
        try:
            async with self._turn(served, cost(served.translator.encode(wanted.source), options)) as turn:
                while self._events.goes_on:
                    self._apply_one()
                if not self._known(False) or self._served is not served:
                    return self._wake_up()
                steps = self._core.advance()
                step = next(steps, None)
                if step is None:
                    return None
                if isinstance(step, Update) or step.final:
                    return self._wake_up()  # it has ended meanwhile
                source = served.translator.encode(step.source)
                found = await self._search(turn, served, step, source, options) if source else served.translator.decode([])
        except ServiceError as error:
            if error.status not in (Status.RESOURCE_EXHAUSTED, Status.DEADLINE_EXCEEDED):
                raise
            asyncio.get_running_loop().call_later(error.retry_after or 0.1, self._wake_up)
            return None
        with contextlib.suppress(StopIteration):
            update = steps.send(found)
            assert isinstance(update, Update)
            self._say(update)

    def _options(self, served: Served) -> SearchOptions:
        return SearchOptions(beam_size=self._opening.beam_size or served.beam_size, scores=False)

    def _turn(self, served: Served, tokens: int) -> AbstractAsyncContextManager[Turn]:
        return served.scheduler.turn(self._client, self._opening.priority, tokens, timeout=self._rules.request)

    async def _search(self, turn: Turn, served: Served, wanted: Wanted, source: list[int], options: SearchOptions) -> Translation:
        if wanted.begun != self._state_of:
            with contextlib.suppress(ConfigError):  # too many are open: it goes without
                self._state = served.open_source()
            self._state_of = wanted.begun
        try:
            found = await turn.search(source, options, prefix=wanted.committed, state=self._state)
        except ConfigError as error:
            raise invalid("open", str(error)) from error
        self._queue_us, self._decode_us = found.queue_us, found.decode_us
        self._metrics.translated(served.info.name, LIVE, found.queue_us, found.decode_us)
        return served.translator.decode(found.found.hypotheses)

    def _wake_up(self) -> None:
        self._events.look_again(self._seq_read)

    def _say(self, update: Update) -> None:
        self._put(
            SessionUpdate(
                update.segment, update.committed, update.tentative, update.final, source_read=update.source_read, segment_begin=update.begin,
                seq_read=self._seq_read, language=self._language if self._opening.source == AUTO else None,
                queue_us=self._queue_us, decode_us=self._decode_us, pieces=() if update.final else update.pieces,
            )
        )  # fmt: skip

    def _put(self, update: SessionUpdate) -> None:
        self.outbox.put(update)
        if self.outbox.unsent > self._rules.unread:
            raise ServiceError(Status.RESOURCE_EXHAUSTED, "too much translated text was not read: read faster", reason="unread")
        self._ready.set()

    # -- models ------------------------------------------------------------------------------------------------------------------------
    def _next_model(self) -> Translator:
        """The model of a sentence that begins: its newest version."""
        found = self._models.find(self._source_language(), self._opening.target, self._opening.model)
        if found is not self._served:
            found.lease()
            self._release()
            self._served = found
        self._state, self._state_of = None, 0
        return found.translator

    def _release(self) -> None:
        if self._served is not None:
            self._served.release()
        self._served = self._state = None

    def _renew(self) -> None:
        """A stream between two sentences keeps no model that has been replaced."""
        core = self._core
        if self._served is not None and self._served.retired and not core.source.strip() and not core.committed:
            try:
                core.reopen()
            except ServiceError as error:  # there is none any more
                self.fail(error)

    def _resume(self) -> None:
        """What another stream had committed of the first sentence, for the model that goes on with it."""
        if self._resumes:
            self._resumes = False
            try:
                self._core.resume(self._opening.committed, self._opening.pieces)
            except ValueError as error:
                raise invalid("open.committed", str(error)) from error

    def _source_language(self) -> str:
        """Of the sentence; "" while it is not known."""
        return "" if self._language is None else self._language.code

    def _known(self, ends: bool) -> bool:
        """Whether the source's language is known, so that it can be translated. Where it has just been found, or has changed, the sentence begins anew."""
        before = self._source_language()
        text = self._core.source
        found = self._sticky.read(text, final=(ends or len(text) > _UNDECIDED) and bool(text.strip()))
        if found is None:
            if ends:
                self._resume()
            return not text.strip()
        self._language = found
        if found.code != before:
            self._core.sentences = Sentences(found.code)
            self._core.reopen()
        self._resume()
        return True

    # -- its reader --------------------------------------------------------------------------------------------------------------------
    def _look(self) -> None:
        now = self._clock()
        if self.outbox.held() > self._rules.stuck:
            message = f"nothing was acknowledged for {self._rules.stuck:g} seconds: acknowledge what was read"
            self.fail(ServiceError(Status.RESOURCE_EXHAUSTED, message, reason="stuck"))
        elif now - self._events.heard > self._rules.idle and not (self._events.closed or self._busy or self._events):
            self.fail(ServiceError(Status.DEADLINE_EXCEEDED, f"nothing came for {self._rules.idle:g} seconds: open another stream"))
        self._renew()
        if self.error is None:
            self._watch = asyncio.get_running_loop().call_later(_CHECKS, self._look)

