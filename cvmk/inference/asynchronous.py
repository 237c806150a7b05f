"""Translation for asyncio: many callers, one engine, whose steps run in a thread of their own."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from cvmk.errors import CvmkError, DataError
from cvmk.inference.engine import Event, Finished, Partial, Request
from cvmk.inference.options import SearchOptions
from cvmk.inference.translator import Translation, Translator


class ExpiredError(CvmkError):
    """A translation was not ready in time."""


class AsyncTranslator:
    """Translates for coroutines of one event loop. What they ask for at the same time is decoded together, each independent of the others.

        async with AsyncTranslator(Translator("model")) as translator:
            first, second = await asyncio.gather(translator.translate("a man"), translator.translate("a dog", beam_size=5))

    A task that is cancelled while it waits takes its request out of the engine. Nobody else may step the engine meanwhile. Where a step of the engine fails,
    what it was working on begins anew, each by itself: whose step fails again raises that, and the others do not notice.
    """

    def __init__(self, translator: Translator) -> None:
        self._translator, self._engine = translator, translator.engine
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards what follows
        self._waiting: dict[Any, _Waiting] = {}
        self._closed = self._recovering = False
        self._step_begun: float | None = None
        self._thread = threading.Thread(target=self._run, name="cvmk-engine", daemon=True)

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        with self._changed:
            self._closed = True
            waiting = list(self._waiting.values())
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        for one in waiting:
            self._engine.cancel(one.id)
            one.future.cancel()

    async def translate(
        self, text: str, *, prefix: str = "", timeout: float | None = None, on_partial: Callable[[str], None] | None = None, **options: Any
    ) -> Translation:
        """The translation of a text. `options` are those of `SearchOptions`; `on_partial` is called in the event loop with what the translation is so
        far, after each step that changes it. Raises ExpiredError after `timeout` seconds, DataError for a text that is too long, ConfigError for options
        and prefixes that the model cannot have, and RuntimeError where the translator is closed."""
        source, begun = self._translator.encode(text), self._translator.encode(prefix)
        if not source:
            return self._translator.decode([])
        tell = None if on_partial is None else _Texts(self._translator, on_partial)
        found = await self.search(source, SearchOptions(**options), prefix=begun, timeout=timeout, on_partial=tell)
        if found.reason == "expired":
            raise ExpiredError(f"the translation was not ready in {timeout} seconds: give it more, or a smaller beam")
        if found.reason == "failed":
            raise DataError("there is no memory for the translation: use a smaller beam, or fewer at a time")
        return self._translator.decode(found.hypotheses)

    async def search(
        self,
        source: Sequence[int],
        options: SearchOptions,
        *,
        prefix: Sequence[int] = (),
        timeout: float | None = None,
        on_partial: Callable[[list[int]], None] | None = None,
        state: Any = None,
    ) -> Finished:
        """What the engine finds for a source's pieces, for whoever wants pieces rather than texts, with the fields of `Request`. `on_partial` is called in the
        event loop with the best pieces so far. Raises as `translate`, but a search that is late or has no memory is told by its `reason`."""
        request = Request((id(self), next(self._numbers)), source, options, prefix, on_partial is not None, timeout, state)
        one = _Waiting(request, asyncio.get_running_loop(), on_partial)
        with self._changed:
            if self._closed or not self._thread.is_alive():
                raise RuntimeError("the translator is closed: use it inside its `async with` block")
            if not self._recovering:
                self._engine.submit(request)
            self._waiting[one.id] = one
            self._changed.notify()
        try:
            return await one.future
        finally:
            with self._changed:
                if self._waiting.pop(one.id, None) is not None:
                    self._engine.cancel(one.id)

    def step_seconds(self) -> float:
        """For how long the engine has been in its present step; 0 where it is in none."""
        begun = self._step_begun
        return 0.0 if begun is None else time.monotonic() - begun

    def _step(self) -> list[Event]:
        self._step_begun = time.monotonic()
        try:
            return self._engine.step()
        finally:
            self._step_begun = None

    def _run(self) -> None:
        """The thread's loop: steps as long as somebody waits."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
            try:
                events = self._step()
            except Exception as error:
                self._recover(error)
                continue
            self._tell(events)

    def _tell(self, events: Sequence[Event]) -> None:
        """Whoever waits for them. An event loop is woken once for all that a step has finished."""
        finished: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Finished], Finished]]] = {}
        with self._changed:
            told = [(event, self._waiting.get(event.id) if isinstance(event, Partial) else self._waiting.pop(event.id, None)) for event in events]
        for event, one in told:
            if one is None:
                continue
            if isinstance(event, Partial):
                one.call(one.on_partial, event.tokens)
            else:
                finished.setdefault(one.loop, []).append((one.future, event))
        for loop, those in finished.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle_all, those)

    def _recover(self, error: Exception) -> None:
        """After a step that failed: who had a part in it begins anew, one after the other, and then whoever came meanwhile, all together. What the engine has
        forgotten fails with the error: it says so that it was that request's."""
        with self._changed:
            self._recovering = True
            suspects = list(self._waiting.values())
            kept = {one.id for one in suspects if self._engine.cancel(one.id)}
        for one in suspects:
            if one.id in kept:
                self._alone(one)
            else:
                self._give_up(one, error)
        with self._changed:
            self._recovering = False
            for one in list(self._waiting.values()):
                self._submit(one)

    def _alone(self, one: _Waiting) -> None:
        """All steps of a request while the engine has no other."""
        try:
            self._step()  # lets go of what was cancelled
            self._submit(one)
            while one.id in self._waiting and not self._closed:
                self._tell(self._step())
        except Exception as error:
            self._give_up(one, error)

    def _submit(self, one: _Waiting) -> None:
        """Once more, with what is left of its time."""
        with self._changed:
            if one.id not in self._waiting:
                return
            try:
                self._engine.submit(one.again())
            except Exception as error:
                self._give_up(one, error)

    def _give_up(self, one: _Waiting, error: Exception) -> None:
        with self._changed:
            self._waiting.pop(one.id, None)
            self._engine.cancel(one.id)
        one.call(_settle, one.future, error)


class _Texts:
    """Tells texts that differ from the last one, of pieces."""

    def __init__(self, translator: Translator, tell: Callable[[str], None]) -> None:
        self._translator, self._tell, self._said = translator, tell, ""

    def __call__(self, tokens: list[int]) -> None:
        text = self._translator.tokenizer.decode(tokens)
        if text != self._said:
            self._said = text
            self._tell(text)


class _Waiting:
    """Somebody who waits for a request."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop, on_partial: Callable[[list[int]], None] | None) -> None:
        self.id, self.loop, self.on_partial = request.id, loop, on_partial
        self._request = request
        self._until = None if request.timeout is None else time.monotonic() + request.timeout
        self.future: asyncio.Future[Finished] = loop.create_future()

    def again(self) -> Request:
        """Its request, with the time that is left."""
        return self._request if self._until is None else dataclasses.replace(self._request, timeout=max(self._until - time.monotonic(), 1e-9))

    def call(self, function: Any, *arguments: Any) -> None:
        """In its event loop, unless that has ended."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *arguments)


def _settle_all(those: Sequence[tuple[asyncio.Future[Finished], Finished]]) -> None:
    for future, result in those:
        _settle(future, result)


def _settle(future: asyncio.Future[Finished], result: Finished | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
