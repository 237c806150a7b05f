"""What a model translates next: a bounded, fair queue before an engine that runs as much at once as it is allowed to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cvmk.inference import AsyncTranslator
from cvmk.inference.engine import Finished
from cvmk.inference.options import SearchOptions
from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.queues import Entry, FairQueue

WEIGHTS = {"low": 1.0, "normal": 4.0, "high": 16.0}
"""Shares of the priorities."""
_HINTS = 0.05, 10.0
"""Seconds: the shortest and the longest hint when to try again."""


@dataclass(frozen=True)
class Searched:
    """What was found, how long it had waited and how long it took, in microseconds."""

    found: Finished
    queue_us: int
    decode_us: int


@dataclass(eq=False)
class _Turn:
    cost: int
    come: asyncio.Future[None]


class Scheduler:
    """Hands searches to a translator: at most `running` tokens (source pieces times beam size) at once, the others wait; at most `waiting` tokens of all
    clients and `waiting_per_client` of one, and what would be more is refused at once. `given_up` is told of those that
    were not finished because of "client" (cancelled) or "deadline". Everything runs in one event loop."""

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
        self._queue: FairQueue[_Turn] = FairQueue()
        self._waiting_of: Counter[str] = Counter()
        self.running = 0
        """Tokens that the engine works on."""
        self._rate, self._since, self._done = 1000.0, clock(), 0

    @property
    def waiting(self) -> int:
        """Tokens that wait."""
        return self._queue.cost

    async def search(
        self,
        client: str,
        priority: str,
        source: Sequence[int],
        options: SearchOptions,
        *,
        prefix: Sequence[int] = (),
        state: Any = None,
        timeout: float | None = None,
    ) -> Searched:
        """What the engine finds. Raises ServiceError where too much waits already, where it is not done within `timeout` seconds, or where there is no memory
        for it. When the task that waits for it is cancelled, it ends within a step."""
        try:
            return await self._search(client, priority, source, options, prefix, state, timeout)
        except asyncio.CancelledError:
            self._given_up("client")
            raise
        except ServiceError as error:
            if error.status is Status.DEADLINE_EXCEEDED:
                self._given_up("deadline")
            raise

    async def _search(
        self, client: str, priority: str, source: Sequence[int], options: SearchOptions, prefix: Sequence[int], state: Any, timeout: float | None
    ) -> Searched:
        cost = (len(source) + 1) * options.beam_size
        begun = self._clock()
        with self._place(client, priority, cost) as turn:
            await _within(turn, timeout)
        started = self._clock()
        try:
            left = None if timeout is None else max(timeout - (started - begun), 1e-6)
            found = await self._translator.search(source, options, prefix=prefix, state=state, timeout=left)
        finally:
            self._ended(cost)
        if found.reason == "expired":
            raise _late()
        if found.reason == "failed":
            raise ServiceError(Status.RESOURCE_EXHAUSTED, "there is no memory for the translation now", retry_after=_HINTS[1], reason="memory")
        return Searched(found, round((started - begun) * 1e6), round((self._clock() - started) * 1e6))

    @contextlib.contextmanager
    def _place(self, client: str, priority: str, cost: int) -> Iterator[asyncio.Future[None]]:
        """A place in the queue, as a future that is done when it is this one's turn; from then on its tokens are running. On an error they are not."""
        if self._queue.cost + cost > self._most or self._waiting_of[client] + cost > self._most_per_client:
            raise ServiceError(Status.RESOURCE_EXHAUSTED, "too much waits to be translated: try again later", retry_after=self._hint(cost), reason="queue")
        turn = _Turn(cost, asyncio.get_running_loop().create_future())
        entry: Entry[_Turn] = self._queue.push((client, priority), WEIGHTS[priority], cost, turn)
        self._waiting_of[client] += cost
        self._fill()
        try:
            yield turn.come
        except BaseException:
            if turn.come.done() and not turn.come.cancelled():
                self._ended(cost)
            self._queue.remove(entry)
            raise
        finally:
            self._waiting_of[client] -= cost
            if not self._waiting_of[client]:
                del self._waiting_of[client]

    def _fill(self) -> None:
        """Turns for whoever there is room for."""
        while self.running < self._limit and (turn := self._queue.pop()) is not None:
            if not turn.come.done():
                self.running += turn.cost
                turn.come.set_result(None)

    def _ended(self, cost: int) -> None:
        self.running -= cost
        self._done += cost
        now = self._clock()
        if (passed := now - self._since) > 1.0:  # an average over the last seconds
            self._rate += 0.3 * (self._done / passed - self._rate)
            self._since, self._done = now, 0
        self._fill()

    def _hint(self, cost: int) -> float:
        return min(max((self._queue.cost + cost) / max(self._rate, 1.0), _HINTS[0]), _HINTS[1])


async def _within(turn: asyncio.Future[None], timeout: float | None) -> None:
    try:
        async with asyncio.timeout(timeout):
            await turn
    except TimeoutError:
        raise _late() from None


def _late() -> ServiceError:
    return ServiceError(Status.DEADLINE_EXCEEDED, "the translation was not ready in time")
