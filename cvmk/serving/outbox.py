"""What a stream has to say and its reader has not been sent: newest tentative text in the place of older, all of the committed text."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonprefix

from cvmk.serving.answers import Language
from cvmk.serving.errors import invalid


@dataclass(frozen=True)
class Refused:
    """A Replace that came too late: the sentence had ended. The stream's text is what it was before."""

    seq: int
    reason: str


@dataclass(frozen=True)
class SessionUpdate:
    """What a stream's reader is told; see StreamResponse in realtime_translation.proto. revision and deleted are right once it is sent."""

    segment: int
    committed: str = ""
    tentative: str = ""
    final: bool = False
    revision: int = 0
    deleted: int = 0
    source_read: int = 0
    segment_begin: int = 0
    seq_read: int = 0
    language: Language | None = None
    queue_us: int = 0
    decode_us: int = 0
    refused: Refused | None = None
    pieces: tuple[int, ...] = ()


class Outbox:
    """At most `credit` updates of sentences that go on are on the way unacknowledged: what comes meanwhile is joined to what waits. The ends of sentences
    are sent whatever was acknowledged."""

    def __init__(self, credit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._credit, self._clock = credit, clock
        self._waiting: deque[SessionUpdate] = deque()
        self._sent: deque[int] = deque()  # revisions of updates that went on
        self._segment, self._tentative = -1, ""  # what the reader was sent last
        self._revision = 0
        self._since = clock()
        self.conflated = 0
        """How often newer tentative text took the place of some that had not been sent."""

    @property
    def unsent(self) -> int:
        """Characters of committed text that wait."""
        return sum(len(update.committed) for update in self._waiting)

    @property
    def empty(self) -> bool:
        return not self._waiting

    def held(self) -> float:
        """For how many seconds something has been waiting, while nothing was sent or acknowledged; 0 where nothing waits."""
        return self._clock() - self._since if self._waiting else 0.0

    def put(self, update: SessionUpdate) -> None:
        """One more thing to say."""
        last = self._waiting[-1] if self._waiting else None
        if last is not None and last.segment == update.segment and not (last.final or last.refused or update.refused):
            before = self._waiting.pop()
            self.conflated += before.tentative != update.tentative
            update = dataclasses.replace(update, committed=before.committed + update.committed, pieces=before.pieces + update.pieces)
        elif not self._waiting:
            self._since = self._clock()
        self._waiting.append(update)

    def take(self) -> SessionUpdate | None:
        """What is to be sent now; None where nothing may be, or nothing is left."""
        while self._waiting and self._may_go(self._waiting[0]):
            update = self._waiting.popleft()
            before = self._tentative if update.segment == self._segment else ""
            now = update.committed + update.tentative
            if not (update.committed or update.final or update.refused or update.tentative != before):
                continue
            self._revision += 1
            self._segment, self._tentative = (self._segment, self._tentative) if update.refused else (update.segment, update.tentative)
            if not update.final and not update.refused:
                self._sent.append(self._revision)
            self._since = self._clock()
            deleted = 0 if update.refused else len(before) - len(commonprefix([before, now]))
            return dataclasses.replace(update, revision=self._revision, deleted=deleted)
        return None

    def acknowledge(self, revision: int) -> None:
        """The reader has read this revision. Raises ServiceError for one that was not sent."""
        if revision > self._revision:
            raise invalid("ack_revision", f"is {revision}, and the last one sent is {self._revision}")
        while self._sent and self._sent[0] <= revision:
            self._sent.popleft()
            self._since = self._clock()

    def _may_go(self, update: SessionUpdate) -> bool:
        return update.final or update.refused is not None or len(self._sent) < self._credit
