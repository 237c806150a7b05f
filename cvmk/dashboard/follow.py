"""The lines of a run's log as they are written, through its rotations, cuts and new beginnings."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cvmk.telemetry.events import EVENTS, set_aside

PIECE = 1 << 20
"""Bytes that one call reads at most."""
LONGEST = 1 << 24
"""Bytes of a line that is read; a longer one counts as broken."""
_SEEN = 64


class Piece(NamedTuple):
    """What a call found: whole lines without their ends, and whether all that was read before no longer counts, because the log is another."""

    lines: list[bytes]
    anew: bool = False


class Follower:
    """Reads `folder`'s log piece by piece, what was appended since the last call only.

    A log that was rotated is read on in its next file. One that was cut, rewritten or replaced is read anew. One that is not there is waited for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: BinaryIO | None = None
        self._position = 0
        self._seen = b""  # the last bytes before the position: where they are others now, the file was rewritten
        self._rest = b""
        self._before = 0  # bytes of the files that are read

    def read(self) -> Piece:
        """The next lines that are whole. Raises OSError where a log is there and cannot be read."""
        if self._file is None and not self._open(self._files()[:1]):
            return Piece([])
        assert self._file is not None
        files = self._files()
        number = os.fstat(self._file.fileno()).st_ino
        place = next((place for place, path in enumerate(files) if _number(path) == number), None)
        data = os.pread(self._file.fileno(), len(self._seen) + PIECE, self._position - len(self._seen))
        if data[: len(self._seen)] != self._seen or (place is None and files and len(data) == len(self._seen)):
            self.close()
            self._before = 0
            return Piece([], anew=True)
        data = data[len(self._seen) :]
        if not data and place is not None and place + 1 < len(files):
            return self._next(files[place + 1])
        return Piece(self._lines(data))

    def progress(self) -> float:
        """The share of the log that is read, 0 to 1."""
        left = 0
        number = os.fstat(self._file.fileno()).st_ino if self._file else None
        for path in reversed(self._files()):
            size = _size(path)
            if _number(path) == number:
                left += max(0, size - self._position)
                break
            left += size
        done = self._before + self._position
        return done / (done + left) if done + left else 1.0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._position, self._seen, self._rest = None, 0, b"", b""

    def _files(self) -> list[Path]:
        """The log's files, the oldest first."""
        return log_files(self.folder)

    def _open(self, files: list[Path]) -> bool:
        for path in files:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            self._file = open(descriptor, "rb", buffering=0)
            return True
        return False

    def _next(self, path: Path) -> Piece:
        """On to the next file; a line that the last one left without its end stays a line of its own."""
        cut, read = [self._rest] if self._rest else [], self._before + self._position
        self.close()
        self._before = read
        self._open([path])
        lines, anew = self.read()
        return Piece(cut + lines, anew)

    def _lines(self, data: bytes) -> list[bytes]:
        self._position += len(data)
        self._seen = (self._seen + data)[-_SEEN:]
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST:
            self._rest = b"\0"  # it makes no line of it a sound one
        return lines


def log_files(folder: Path) -> list[Path]:
    """The files of the log in `folder`, the oldest first: events.1.jsonl, events.2.jsonl, ..., events.jsonl."""
    path = folder / EVENTS
    try:
        files = [*set_aside(path).values(), path]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [file for file in files if stat.S_ISREG(_mode(file))]


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def _number(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
