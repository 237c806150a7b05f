"""Updates that have come and that nobody has taken yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from os.path import commonprefix

from cvmk.serving.answers import Language
from cvmk.streaming import Update

FULL = 1 << 20


@dataclass(frozen=True)
class LiveUpdate(Update):
    """An `Update` of a stream of the service. `revision` counts what was taken. `language` is the source's, where it was asked to be found and is known;
    times are in microseconds."""

    language: Language | None = None
    queue_us: int = 0
    decode_us: int = 0


class Unread:
    """What a slow reader has before it: of each sentence one update, which says all that came in the meantime.

    An update that comes in has the revision of its connection; the one that is taken counts on over all of them, and what it deletes is what the reader saw.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[LiveUpdate, int]] = deque()
        self._revision = self._characters = 0
        self._committed = self._seen = ""

    @property
    def full(self) -> bool:
        """Whether no more should be fetched before some is taken."""
        return self._characters > FULL

    def put(self, update: LiveUpdate, connection: int) -> None:
        if self._waiting and self._waiting[-1][0].segment == update.segment:
            last, _ = self._waiting.pop()
            self._characters -= _size(last)
            update = replace(update, committed=last.committed + update.committed, language=update.language or last.language)
        self._waiting.append((update, connection))
        self._characters += _size(update)

    def take(self) -> tuple[LiveUpdate, int, int] | None:
        """The next update, its connection and its revision there; None where there is none."""
        if not self._waiting:
            return None
        update, connection = self._waiting.popleft()
        self._characters -= _size(update)
        self._revision += 1
        before, committed = self._committed + self._seen, self._committed + update.committed
        now = committed + update.tentative
        deleted = len(before) - len(commonprefix([before, now]))
        self._committed, self._seen = ("", "") if update.final else (committed, update.tentative)
        return replace(update, revision=self._revision, deleted=deleted), connection, update.revision


def _size(update: LiveUpdate) -> int:
    return len(update.committed) + len(update.tentative) + 1
