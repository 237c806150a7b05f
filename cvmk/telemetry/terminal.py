"""The terminal as a subscriber to a run's events."""

from __future__ import annotations

import contextlib
import select
import sys

from cvmk.telemetry.console import Progress, Reporter
from cvmk.telemetry.schema import Anomaly, Epoch, Event, Record, Start, Step, Tick, Validation

_EPOCH_SECONDS = 30.0


class Terminal:
    """Shows a run by a `Reporter`: a line an event that has a text, and the iterations as progress. Of epochs those with anomalies, now and then."""

    def __init__(self, reporter: Reporter, title: str) -> None:
        self._reporter, self._title = reporter, title
        self._bar: Progress | None = None
        self._open = contextlib.ExitStack()
        self._best = ""
        self._epoch = -_EPOCH_SECONDS

    def receive(self, record: Record) -> None:
        event = record.event
        _wait_for_room()
        if isinstance(event, (Tick, Step)):
            self._progress(event)
        elif isinstance(event, Anomaly) or (isinstance(event, Epoch) and not self._tells(event, record.time)):
            return
        elif isinstance(event, Validation):
            if event.best:
                self._best = f"  best {event.metric} {event.value:.2f}"
            self._reporter.say(f"{self._title} {event.step}: validation {event.summary()}{'  (best so far)' if event.best else ''}")
        elif (text := event.text()) is not None:
            self._reporter.say(f"{self._title}: {text}")
        if isinstance(event, Start) and self._bar is None:
            self._bar = self._open.enter_context(self._reporter.progress(self._title, event.iterations or 0, event.step))

    def _progress(self, event: Event) -> None:
        if self._bar is None:
            return
        if isinstance(event, Step):
            self._bar.update(event.step, event.summary() + self._best, log=True)
        elif isinstance(event, Tick):
            self._bar.update(event.step, (event.text() or "") + self._best)

    def _tells(self, event: Epoch, now: float) -> bool:
        if not event.anomalies or now - self._epoch < _EPOCH_SECONDS:
            return False
        self._epoch = now
        return True

    def close(self) -> None:
        self._open.close()


def _wait_for_room() -> None:
    """Wait until standard error takes a line.

    A thread that waits while it writes holds the stream's lock, and a process whose stream is locked cannot even end.
    """
    try:
        poll = select.poll()
        poll.register(sys.stderr.fileno(), select.POLLOUT)
    except (AttributeError, OSError, ValueError):  # no file behind it
        return
    poll.poll()
