"""Reading `events.jsonl`: of any age, whole or cut, while it grows and while it is rotated."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cvmk.files import explained
from cvmk.telemetry.events import set_aside
from cvmk.telemetry.schema import KINDS, Record, Unknown

_PROBLEMS = 20
"""Broken lines that are named; the others are counted."""
_SEEN = 64
_PIECE = 1 << 20


class EventReader:
    """Reads what has been added since the last call, as far as it is whole; what cannot be read is told by `problems`, not raised.

    Files that were full and set aside (events.1.jsonl, ...) are read before the one that `path` names.

    anew: whether the last call found another log where it had read, or one that was cut or rewritten there, and began again with that file.
    progress: the share of the log that is read, 0 to 1.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._number = 0
        """Of the file that is being read: the one that it has, or will have once it is set aside."""
        self._inode = 0
        self._position = self._line = 0
        self._name = self.path
        self._unknown: Counter[tuple[str, str]] = Counter()
        self._broken: list[str] = []
        self._more = 0
        self._gone = ""
        self._rest = b""
        self._seen = b""
        """The last bytes before the position: where they are others now, the file was rewritten."""
        self._done = 0
        self.anew = False
        self.progress = 0.0

    def read(self, most: int | None = None) -> list[Record]:
        """The new events, in order; with `most`, those of about as many bytes of one file: there may be more as long as `progress` is not 1.

        A last line without its end is left for the next call. Raises DataError where the file cannot be read.
        """
        records: list[Record] = []
        self.anew = False
        with contextlib.ExitStack() as stack:
            with explained(self.path, "read"):
                files = self._files(stack)
            for number, (path, file) in files.items():
                with explained(path, "read"):
                    self._turn_to(number, path, file)
                    records += self._lines(file, most, last=number == max(files))
                if most is not None and (records or self._left(file)):
                    break
            left = sum(self._left(file) if number == self._number else _size(file) for number, (_, file) in files.items() if number >= self._number)
            self.progress = self._done / (self._done + left) if left else 1.0
        return records

    def records(self) -> Iterator[Record]:
        """As `read`, one by one, so that a long run need not be held as a whole."""
        while True:
            yield from self.read(_PIECE)
            if self.progress == 1:
                return

    def problems(self) -> list[str]:
        """What could not be read so far, a sentence each."""
        found = [self._gone] if self._gone else []
        found += [
            f"{self.path}: {count} {'event' if count == 1 else 'events'} {kind!r} of version {version} {'is' if count == 1 else 'are'} passed over, "
            + (f"this cvmk reads up to version {KINDS[kind].VERSION}" if kind in KINDS else "this cvmk does not know that kind")
            for (kind, version), count in self._unknown.items()
        ]
        found += self._broken
        if self._more:
            found.append(f"{self.path}: {self._more} more lines cannot be read")
        if self._rest:
            found.append(f"{self._name} line {self._line + 1} is cut off: it is left out")
        return found

    def _files(self, stack: contextlib.ExitStack) -> dict[int, tuple[Path, BinaryIO]]:
        """The files that hold what was not read yet, open, by their numbers, the oldest first."""
        while True:
            current = _opened(self.path, stack)
            older = set_aside(self.path)
            if _is(current, self.path):
                break  # else the numbers are not those of when it was opened
        names = older if current is None else {**older, max(older, default=0) + 1: self.path}
        if not names:
            raise FileNotFoundError(2, os.strerror(2))
        after = self._number
        if after > max(names):  # another run's log: ours had more files
            after, self.anew = 0, True
        if (first := min(names)) > max(after, 1):
            self._gone = f"{self.path}: what was written before {names[first].name} is no longer there"
        files = {number: current if path == self.path else _opened(path, stack) for number, path in names.items() if number >= after}
        return {number: (names[number], file) for number, file in files.items() if file is not None}

    def _turn_to(self, number: int, path: Path, file: BinaryIO) -> None:
        """Go on in this file, or begin with it."""
        status = os.fstat(file.fileno())
        is_same = (number, status.st_ino) == (self._number, self._inode) and self._is_as_it_was(file)
        if not is_same:
            self.anew |= number == self._number
            self._position = self._line = 0
            self._seen = b""
        self._number, self._inode, self._name = number, status.st_ino, path

    def _is_as_it_was(self, file: BinaryIO) -> bool:
        file.seek(self._position - len(self._seen))
        return file.read(len(self._seen)) == self._seen

    def _lines(self, file: BinaryIO, most: int | None, *, last: bool) -> Iterator[Record]:
        """The events of the whole lines from the present position on; what is behind them in a file that grows no more is broken."""
        file.seek(self._position)
        data = file.read() if most is None else file.read(most)
        while most is not None and b"\n" not in data and (more := file.read(most)):
            data += more  # a long line
        end = data.rfind(b"\n") + 1
        self._position += end
        self._done += end
        self._seen = (self._seen + data[:end])[-_SEEN:]
        self._rest = data[end:]
        for line in data[:end].split(b"\n")[:-1]:
            if (record := self._record(line)) is not None:
                yield record
        if self._rest and not last and not self._left(file):
            self._problem("it is cut off", self._line + 1)
            self._rest = b""

    def _left(self, file: BinaryIO) -> int:
        """Bytes of the present file that no call has seen."""
        return max(0, _size(file) - self._position - len(self._rest))

    def _record(self, line: bytes) -> Record | None:
        self._line += 1
        if not line.strip():
            return None
        try:
            return Record.from_json(json.loads(line))
        except Unknown as unknown:
            self._unknown[unknown.kind, str(unknown.version)] += 1
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            no_json = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
            self._problem("it is no JSON, as where a run was killed" if no_json else str(error), self._line)
        return None

    def _problem(self, reason: str, line: int) -> None:
        if len(self._broken) < _PROBLEMS:
            self._broken.append(f"{self._name} line {line} is left out: {reason}")
        else:
            self._more += 1


def read_events(path: str | os.PathLike[str]) -> tuple[list[Record], list[str]]:
    """All events of a file and of those that were set aside before it, and what could not be read, a sentence each.

    Raises DataError where there is no file that can be read.
    """
    reader = EventReader(path)
    return reader.read(), reader.problems()


def _opened(path: Path, stack: contextlib.ExitStack) -> BinaryIO | None:
    try:
        return stack.enter_context(open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)))  # a pipe would hold us up
    except FileNotFoundError:
        return None


def _is(file: BinaryIO | None, path: Path) -> bool:
    """Whether `path` names this file now; for None, no file."""
    try:
        now = path.stat()
    except FileNotFoundError:
        return file is None
    return file is not None and os.path.samestat(os.fstat(file.fileno()), now)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size
