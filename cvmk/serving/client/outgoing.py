"""The text of a stream, as far as it may have to be said again on another connection."""

from __future__ import annotations

from typing import Any

from cvmk.serving import messages

PIECE = 8192
"""Characters of a message at most: 32 KiB of UTF-8."""


class StartAnewError(Exception):
    """What is to be said cannot be said to this session: another one has to begin where the last final sentence ended."""


class Outgoing:
    """What the user writes, from the end of the last final sentence on, and how much of it this connection has been sent.

    All positions count characters of the whole text. Messages are made when they are sent, so that what is written in the meantime goes in one.

    A replacement is told to the server by its distance from the beginning of the sentence that has not ended there. Where that is not known, and where the
    sentence had ended when the replacement arrived, a new session is given the text as it is now, from the end of the last final sentence on.
    """

    def __init__(self) -> None:
        self.begin = 0
        self.text = ""
        self.closed = False
        self._ends: list[int] = []  # where the user ended sentences
        self._changed: int | None
        self.connect(0)

    @property
    def length(self) -> int:
        """Characters of the whole text."""
        return self.begin + len(self.text)

    # -- the user ---------------------------------------------------------------------------------------------------------------------
    def append(self, text: str) -> None:
        self.text += text

    def replace(self, from_char: int, text: str) -> None:
        """Raises ValueError for a place that is none, or that lies in a sentence that has ended."""
        floor = self._floor()
        if not floor <= from_char <= self.length:
            raise ValueError(f"the text from character {floor} to {self.length} can be replaced, and not from {from_char} on: sentences before that have ended")
        self.text = self.text[: from_char - self.begin] + text
        if from_char < self._sent:
            self._changed = from_char if self._changed is None else min(self._changed, from_char)

    def end_segment(self) -> None:
        """Nothing where no sentence has begun."""
        if self.text[self._floor() - self.begin :].strip():
            self._ends.append(self.length)

    def _floor(self) -> int:
        return max([self.begin, *self._ends[-1:]])

    # -- the connection ---------------------------------------------------------------------------------------------------------------
    def connect(self, segment: int) -> None:
        """A new connection, which has been sent nothing, and where this sentence comes first."""
        self.base = self._sent = self.begin
        self._open: tuple[int, int] | None = segment, self.begin  # number and beginning of the sentence that has not ended there, if they are known
        self._changed = None  # what was sent is not what is written now, from here on
        self._seq = self._ends_sent = 0
        self.close_sent = False

    @property
    def pending(self) -> bool:
        """Whether there is something to say."""
        said = self._sent >= self.length and self._ends_sent == len(self._ends) and self._changed is None
        return not said or (self.closed and not self.close_sent)

    def next_request(self) -> Any:
        """The next message of the text, from now on taken for sent; None where there is none. Raises StartAnewError."""
        if self._changed is not None:
            return self._replace(self._changed)
        if self._ends_sent < len(self._ends) and self._ends[self._ends_sent] <= self._sent:
            self._ends_sent += 1
            self._open = None
            return messages.StreamRequest(end_segment=messages.EndSegment())
        if (piece := self._piece(self._sent)) != "":
            self._seq += 1
            self._sent += len(piece)
            return messages.StreamRequest(append=messages.Append(seq=self._seq, text=piece.encode()))
        if self.closed and not self.close_sent:
            self.close_sent = True
            return messages.StreamRequest(close=messages.Close())
        return None

    def _replace(self, place: int) -> Any:
        if self._open is None or place < self._open[1]:
            raise StartAnewError
        segment, begin = self._open
        piece = self._piece(place)
        self._seq += 1
        self._changed, self._sent = None, place + len(piece)
        return messages.StreamRequest(replace=messages.Replace(seq=self._seq, segment=segment, from_char=place - begin, text=piece.encode()))

    def _piece(self, place: int) -> str:
        end = self._ends[self._ends_sent] if self._ends_sent < len(self._ends) else self.length
        return self.text[place - self.begin : min(end, place + PIECE) - self.begin]

    # -- the server -------------------------------------------------------------------------------------------------------------------
    def goes_on(self, segment: int, begin: int) -> None:
        """A sentence that has not ended begins at this character of the connection's text."""
        place = self.base + begin
        if not self._ends_sent or place >= self._ends[self._ends_sent - 1]:
            self._open = segment, place

    def ended(self, end: int) -> None:
        """A sentence is final; it ends at this character of the connection's text."""
        end = max(self.begin, self.base + end)
        self.text, self.begin = self.text[end - self.begin :], end
        past = sum(place <= end or not self.text[: place - end].strip() for place in self._ends)  # what ends there has ended
        self._ends, self._ends_sent = self._ends[past:], max(0, self._ends_sent - past)
        self._sent = max(self._sent, end)
        self._changed = None if self._changed is None else max(self._changed, end)
        self._open = None
