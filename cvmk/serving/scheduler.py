"""What a model translates next: a bounded, fair queue before an engine that runs as much at once as it is allowed to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cvmk.inference import AsyncTranslator
from cvmk.inference.engine import Finished
from cvmk.inference.options import SearchOptions
from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.queues import Entry, FairQueue
from cvmk.serving.tasks import together

WEIGHTS = {"low": 1.0, "normal": 4.0, "high": 16.0}
"""Shares of the priorities."""
_NEARLY = 15 / 16
_HINTS = 0.05, 10.0
"""Seconds: the shortest and the longest hint when to try again."""


_ACTIVE = 1.0
"""Seconds after it has asked for something in which a client has a share."""
_FREE = 2
"""Shares that are nobody's where several clients ask: batches stay small, and steps quick, for whoever asks seldom; it costs a sixth of the throughput."""
_LEAST = 64
"""Tokens of the smallest share: two or three sentences, so that a batch is not of one."""


_SHORT = 8
"""Tokens of a short sentence."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Searched:
    """What was found, how long it had waited and how long it took, in microseconds."""

    found: Finished
    queue_us: int
    decode_us: int


@dataclass(eq=False)
class _Waiting:
    client: str
    cost: int
    come: asyncio.Future[None]


class Scheduler:
    """Hands searches to a translator: at most `running` tokens (source pieces times beam size) at once, the others wait; at most `waiting` tokens of all
    clients and `waiting_per_client` of one, and what would be more is refused at once. Of what runs, each client that has asked for something in the last
    second has an equal share, and some is left free: a step takes as long as its batch is large, so that whoever asks for much would slow down whoever asks for
    little. `given_up` is told of those that were not finished because of "client" (cancelled) or "deadline". Everything runs in one event loop."""

    def __init__(
        self,
        translator: AsyncTranslator,
        running: int,
        waiting: int,
        waiting_per_client: int,
        *,
        given_up: Callable[[str], None] = lambda kind: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._translator, self._given_up, self._clock = translator, given_up, clock
        self._limit, self._most, self._most_per_client = running, waiting, waiting_per_client
        self._queue: FairQueue[_Waiting] = FairQueue()
        self._held = 0  # tokens that are not in the queue yet
        self._waiting_of: Counter[str] = Counter()
        self._running_of: Counter[str] = Counter()
        self._asked: OrderedDict[str, float] = OrderedDict()  # when each client of the last second last asked, the oldest first
        self.running = 0
        """Tokens that the engine works on."""
        self._rate, self._since, self._done = 1000.0, clock(), 0

    @property
    def waiting(self) -> int:
        """Tokens that wait."""
        return self._queue.cost + self._held

    def check_room(self, client: str) -> None:
        """Raises what `turn` does where the queues are nearly full: before a whole text is made ready for it, which costs more than the refusal, and leaving
        the rest to streams."""
        if self.waiting > _NEARLY * self._most or self._waiting_of.get(client, 0) > _NEARLY * self._most_per_client:
            raise self._full(0)

    async def search(
        self, client: str, priority: str, source: Sequence[int], options: SearchOptions, *, timeout: float | None = None, **fields: Any
    ) -> Searched:
        """`turn`, and its search."""
        async with self.turn(client, priority, cost(source, options), timeout=timeout) as turn:
            return await turn.search(source, options, **fields)

    async def search_all(
        self,
        client: str,
        priority: str,
        sources: Sequence[Sequence[int]],
        options: SearchOptions,
        *,
        told: Callable[[Searched], _T],
        timeout: float | None = None,
    ) -> list[_T]:
        """`search` of each source, and in their order what `told` makes of what was found. They are taken or refused together. No more of them are in the queue
        than can run: of ten thousand, the others cost nothing until then."""
        begun, held = self._clock(), (sum(map(len, sources)) + len(sources)) * options.beam_size
        at_once = 0 if self.waiting else max(self._limit - self.running, 0)  # what runs at once does not wait
        self._check(client, max(held - at_once, 0))
        found: list[Any] = [None] * len(sources)
        rest = enumerate(sources)

        async def work() -> None:
            nonlocal held
            for index, source in rest:
                tokens = cost(source, options)
                held -= tokens
                self._hold(client, -tokens)
                async with self.turn(client, priority, tokens, timeout=timeout, begun=begun) as turn:
                    found[index] = told(await turn.search(source, options))

        self._hold(client, held)
        try:
            await together(work, [()] * min(len(sources), max(self._limit // _SHORT, _LEAST // _SHORT)))
        finally:
            self._hold(client, -held)
        return found

    def _hold(self, client: str, tokens: int) -> None:
        """So many tokens of a client wait outside of the queue, or fewer."""
        self._held += tokens
        self._wait(client, tokens)

    def _wait(self, client: str, tokens: int) -> None:
        self._waiting_of[client] += tokens
        if not self._waiting_of[client]:
            del self._waiting_of[client]

    @contextlib.asynccontextmanager
    async def turn(
        self, client: str, priority: str, tokens: int, *, timeout: float | None = None, begun: float | None = None
    ) -> AsyncIterator[Turn]:
        """Waits until it is the turn of a search of about so many tokens, which may then be decided on. Raises ServiceError where too much waits already (but
        for what has been taken before, when it had `begun` to wait), and, by the search too, where it is not done within `timeout` seconds or where there is no
        memory for it. When the task that waits is cancelled, the search ends within a step."""
        try:
            if begun is None:
                begun = self._clock()
                self._check(client, tokens)
            left = None if timeout is None else max(timeout - (self._clock() - begun), 1e-6)
            await self._come(client, priority, tokens, left)
            turn = Turn(self, client, self._translator, self._clock, tokens, begun, timeout)
            try:
                yield turn
            finally:
                self._ended(client, turn.tokens)
        except asyncio.CancelledError:
            self._given_up("client")
            raise
        except ServiceError as error:
            if error.status is Status.DEADLINE_EXCEEDED:
                self._given_up("deadline")
            raise

    async def _come(self, client: str, priority: str, tokens: int, timeout: float | None) -> None:
        """Waits in the queue; when it is this one's turn its tokens are running. On an error they are not."""
        one = _Waiting(client, tokens, asyncio.get_running_loop().create_future())
        self._asked[client] = self._clock()
        self._asked.move_to_end(client)
        entry: Entry[_Waiting] = self._queue.push((client, priority), WEIGHTS[priority], tokens, one)
        self._wait(client, tokens)
        self._fill()
        try:
            if not one.come.done():
                await _within(one.come, timeout)
        except BaseException:
            if one.come.done() and not one.come.cancelled():
                self._ended(client, tokens)
            self._queue.remove(entry)
            raise
        finally:
            self._wait(client, -tokens)

    def _check(self, client: str, tokens: int) -> None:
        if self.waiting + tokens > self._most or self._waiting_of.get(client, 0) + tokens > self._most_per_client:
            raise self._full(tokens)

    def _fill(self) -> None:
        """Turns for whoever there is room for."""
        share = self._share()

        def ready(flow: Hashable) -> bool:
            running = self._running_of[flow[0]]  # type: ignore[index]
            return not running or running < share

        while self.running < self._limit and (one := self._queue.pop(ready)) is not None:
            if not one.come.done():
                self.changed(one.client, one.cost)
                one.come.set_result(None)

    def _share(self) -> float:
        """Tokens of one client that may run."""
        long_ago = self._clock() - _ACTIVE
        while self._asked and next(iter(self._asked.values())) < long_ago:
            self._asked.popitem(last=False)
        return self._limit if len(self._asked) < 2 else max(self._limit / (len(self._asked) + _FREE), _LEAST)

    def changed(self, client: str, tokens: int) -> None:
        """So many tokens more of a client run, or fewer."""
        self.running += tokens
        self._running_of[client] += tokens
        if not self._running_of[client]:
            del self._running_of[client]

    def _ended(self, client: str, tokens: int) -> None:
        self.changed(client, -tokens)
        self._done += tokens
        now = self._clock()
        if (passed := now - self._since) > 1.0:  # an average over the last seconds
            self._rate += 0.3 * (self._done / passed - self._rate)
            self._since, self._done = now, 0
        self._fill()

    def _full(self, tokens: int) -> ServiceError:
        hint = self._hint(tokens)
        return ServiceError(Status.RESOURCE_EXHAUSTED, "too much waits to be translated: try again later", retry_after=hint, reason="queue")

    def _hint(self, tokens: int) -> float:
        return min(max((self.waiting + tokens) / max(self._rate, 1.0), _HINTS[0]), _HINTS[1])


class Turn:
    """It is somebody's turn: the engine has room for a search of about so many tokens."""

    def __init__(
        self,
        scheduler: Scheduler,
        client: str,
        translator: AsyncTranslator,
        clock: Callable[[], float],
        tokens: int,
        begun: float,
        timeout: float | None,
    ) -> None:
        self._scheduler, self._client, self._translator, self._clock = scheduler, client, translator, clock
        self.tokens, self._begun, self._timeout = tokens, begun, timeout

    async def search(self, source: Sequence[int], options: SearchOptions, *, prefix: Sequence[int] = (), state: Any = None) -> Searched:
        """What the engine finds."""
        tokens = cost(source, options)
        self._scheduler.changed(self._client, tokens - self.tokens)
        self.tokens = tokens
        started = self._clock()
        left = None if self._timeout is None else max(self._timeout - (started - self._begun), 1e-6)
        found = await self._translator.search(source, options, prefix=prefix, state=state, timeout=left)
        if found.reason == "expired":
            raise _late()
        if found.reason == "failed":
            raise ServiceError(Status.RESOURCE_EXHAUSTED, "there is no memory for the translation now", retry_after=_HINTS[1], reason="memory")
        return Searched(found, round((started - self._begun) * 1e6), round((self._clock() - started) * 1e6))


def cost(source: Sequence[int], options: SearchOptions) -> int:
    """Tokens of a search: source pieces, with the one at their end, times beam size."""
    return (len(source) + 1) * options.beam_size


async def _within(come: asyncio.Future[None], timeout: float | None) -> None:
    try:
        async with asyncio.timeout(timeout):
            await come
    except TimeoutError:
        raise _late() from None


def _late() -> ServiceError:
    return ServiceError(Status.DEADLINE_EXCEEDED, "the translation was not ready in time")
