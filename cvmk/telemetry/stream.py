"""Events on their way from a run to its logs and to whoever looks on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Protocol

from cvmk.telemetry.events import RunLog
from cvmk.telemetry.schema import Event, Note, Notice, Record, Tick

_WAITING = 10_000
"""Events that may wait for a subscriber; later ones are lost to it."""
_TICK_SECONDS = 0.1
_CLOSING_SECONDS = 5.0


class Subscriber(Protocol):
    """Whoever looks on: the terminal, TensorBoard, a live page, a search that prunes. It is called from one thread of its own."""

    def receive(self, record: Record) -> None:
        """An event, in order. An exception ends the subscription, and nothing else."""

    def close(self) -> None:
        """No more events will come."""


class EventStream:
    """Writes every event to the run's logs at once, and hands it to the subscribers, each in a thread of its own.

    A log that cannot be written ends the run (DataError), for its record would be lost. A subscriber cannot: one that raises is
    unsubscribed and named in the logs, one that blocks loses what does not fit its queue, and `close` waits a few seconds at most. Any thread may
    emit.
    """

    def __init__(self, log: RunLog, subscribers: Sequence[Subscriber] = ()) -> None:
        self._log = log
        self._subscriptions = [_Subscription(subscriber) for subscriber in subscribers]
        self._ticked = 0.0
        self._writing = threading.Lock()

    def emit(self, event: Event) -> None:
        """Record the event, and pass it on. Raises DataError where a log cannot be written."""
        if not event.RECORDED:  # without the lock: it may come from a signal handler, while the lock is held
            self._pass_on(Record.now(event))
            return
        with self._writing:
            record = Record.now(event)
            self._log.write(record)
            self._name_failures()
            self._pass_on(record)

    def tick(self, step: int, loss: float, tokens_per_second: float) -> None:
        """An iteration was done: passed on now and then, recorded never."""
        if self._subscriptions and (now := time.monotonic()) - self._ticked >= _TICK_SECONDS:
            self._ticked = now
            self.emit(Tick(step, loss, tokens_per_second))

    def note(self, message: str) -> None:
        """Record a plain sentence."""
        self.emit(Note(message))

    def notice(self, message: str) -> None:
        """A sentence for whoever looks on now; may be called from a signal handler."""
        self.emit(Notice(message))

    def close(self) -> None:
        """Let the subscribers take what waits for them, for a few seconds at most, and close the logs."""
        for subscription in self._subscriptions:
            subscription.finish()
        end = time.monotonic() + _CLOSING_SECONDS
        for subscription in self._subscriptions:
            subscription.join(max(0.0, end - time.monotonic()))
        try:
            self._name_failures()
        finally:
            self._log.close()

    def _pass_on(self, record: Record) -> None:
        for subscription in self._subscriptions:
            subscription.put(record)

    def _name_failures(self) -> None:
        failures = [failure for subscription in self._subscriptions for failure in subscription.failures()]
        for record in map(Record.now, map(Note, failures)):
            self._log.write(record)
            self._pass_on(record)


class _Subscription:
    """A subscriber, its queue and its thread. The queue is one that a signal handler may write to."""

    def __init__(self, subscriber: Subscriber) -> None:
        self._subscriber = subscriber
        self._queue: SimpleQueue[Record | None] = SimpleQueue()
        self._lost = 0
        self._failures: list[str] = []
        self._over = False
        self._thread = threading.Thread(target=self._run, name=f"cvmk {type(subscriber).__name__}", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        if self._over:
            return
        if self._queue.qsize() < _WAITING:
            self._queue.put(record)
        elif record.event.RECORDED:
            self._lost += 1
            if self._lost == 1:
                self._failures.append(f"the subscriber {self._name} is too slow: it loses events")

    def finish(self) -> None:
        self._queue.put(None)
        if self._lost:
            self._failures.append(f"the subscriber {self._name} lost {self._lost} events in all")

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._failed("does not answer: it is left behind")

    def failures(self) -> list[str]:
        """What went wrong since the last call, a sentence each."""
        found, self._failures = self._failures, []
        return found

    @property
    def _name(self) -> str:
        return type(self._subscriber).__name__

    def _failed(self, what: str) -> None:
        self._over = True
        self._failures.append(f"the subscriber {self._name} {what}; the run goes on without it")

    def _run(self) -> None:
        try:
            while (record := self._queue.get()) is not None:
                self._guarded(lambda: self._subscriber.receive(record))
                if self._over:
                    break
        finally:
            self._guarded(self._subscriber.close)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # a subscriber's SystemExit too is its own affair
            self._failed(f"failed ({type(error).__name__}: {error})")
