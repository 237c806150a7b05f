"""Stopping a training before its end: Ctrl-C, SIGTERM, or whoever looks on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or another request to stop was answered with a checkpoint."""


class StopSignal:
    """Whether somebody has asked a training, or a search over trainings, to stop."""

    def __init__(self) -> None:
        self.received = False

    def request(self) -> None:
        """Let the iteration end, write a checkpoint and raise Interrupted. May be called from any thread, such as a subscriber's to the events."""
        self.received = True

    @contextmanager
    def listening(self, notice: Callable[[str], None], what_happens: str = "stopping after this iteration") -> Iterator[None]:
        """The first Ctrl-C or SIGTERM sets `received` and is answered by `what_happens`: the iteration ends and a checkpoint is written. The second stops at
        once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.received:
                raise KeyboardInterrupt
            self.received = True
            notice(f"{what_happens}; once more to stop at once")

        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever owns it handles signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
