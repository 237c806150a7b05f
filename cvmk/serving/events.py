"""What comes of a stream: how it is opened, and its events until they are brought into the text."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cvmk.serving.errors import ServiceError, Status, invalid
from cvmk.streaming import Policy, Retranslation

CREDIT, MOST_CREDIT = 2, 64
_SIZE = 16
"""Characters that an event counts for, beside its text."""
_ARRIVED = 256
"""Events that are timed until an update answers them."""


@dataclass(frozen=True)
class Opening:
    """What a stream is opened with; see Open in realtime_translation.proto. `policy` says what is shown when."""

    source: str = "auto"
    target: str = ""
    model: str = ""
    policy: Policy = field(default_factory=Retranslation)
    priority: str = "normal"
    credit: int = 0
    session: str = ""
    first_segment: int = 0
    committed: str = ""
    pieces: tuple[int, ...] = ()
    beam_size: int = 0
    partial_words: bool = False


@dataclass(frozen=True)
class Event:
    """More text; or, with a `begin`, text instead of what stands from there on in sentence `segment`; or the end of a sentence, or of all."""

    seq: int
    text: str = ""
    begin: int | None = None
    segment: int | None = None
    ends: bool = False
    closes: bool = False


class Events:
    """Those that wait, in their order; at most `text` characters before `room` is shut."""

    def __init__(self, text: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._text, self._clock = text, clock
        self._waiting: deque[Event] = deque()
        self._characters = self._seq = 0
        self._arrived: deque[tuple[int, float]] = deque(maxlen=_ARRIVED)  # of those that no update has answered
        self.heard = clock()
        """When something came last."""
        self.closed = False
        self.wake, self.room = asyncio.Event(), asyncio.Event()
        self.room.set()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def seq(self) -> int:
        """Of the last one that has come."""
        return self._seq

    @property
    def goes_on(self) -> bool:
        """Whether the next one, which there is, belongs to the sentence that is open."""
        return bool(self._waiting) and not self._waiting[0].ends

    def put(self, name: str, event: Event) -> None:
        """One more. Raises ServiceError for what is wrong with it."""
        self.heard = self._clock()
        if self.closed:
            raise ServiceError(Status.FAILED_PRECONDITION, f"{name} came after close: open another stream", field=name)
        if not event.ends:
            if event.seq != self._seq + 1:
                raise invalid(f"{name}.seq", f"is {event.seq}, and {self._seq + 1} comes next: Append and Replace are counted from 1 without gaps")
            self._seq = event.seq
            self._arrived.append((event.seq, self.heard))
        if len(event.text) > self._text:
            raise invalid(f"{name}.text", f"has {len(event.text)} characters, and {self._text} are allowed: send it in parts")
        self._waiting.append(event)
        self._characters += len(event.text) + _SIZE
        if self._characters > self._text:
            self.room.clear()
        self.wake.set()

    def take(self) -> Event:
        """The next one."""
        event = self._waiting.popleft()
        self._characters -= len(event.text) + _SIZE
        if self._characters <= self._text:
            self.room.set()
        return event

    def look_again(self, seq: int) -> None:
        """Where none waits, one that brings nothing, but has the text looked at again."""
        if not self._waiting:
            self._waiting.append(Event(seq))
            self._characters += _SIZE
        self.wake.set()

    def answered(self, seq: int) -> float | None:
        """When the newest came that an update takes into account by saying this `seq`; None where no update was waited for."""
        arrived = None
        while self._arrived and self._arrived[0][0] <= seq:
            arrived = self._arrived.popleft()[1]
        return arrived
