"""The two logs of a run: `events.jsonl` for programs, `log.txt` for people. Both go on in a new file where one is full."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

from cvmk.errors import ConfigError
from cvmk.files import explained, lock
from cvmk.telemetry.schema import Record

EVENTS = "events.jsonl"
LOG_BYTES = 20_000_000
LOG_FILES = 20
_LOCK = ".log.lock"


class _LoudHandler(logging.handlers.RotatingFileHandler):
    """A handler that lets a full disk stop the run instead of printing a traceback and going on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


class RunLog:
    """Appends to the logs in `folder`, after what a run that was interrupted has left there. A line is written and flushed at once.

    A log that would grow beyond `max_bytes` is set aside, and `files` of those are kept: events.1.jsonl is the oldest of all, `EventReader` reads
    what is left of them as one; log.txt.1 is the latest. One process writes at a time. Raises ConfigError where another one does, DataError
    where writing fails.
    """

    def __init__(self, folder: Path, max_bytes: int = LOG_BYTES, files: int = LOG_FILES) -> None:
        self._path, self._max_bytes, self._files = folder / EVENTS, max_bytes, files
        self._torn = False
        with explained(folder, "write the logs in"):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
            _mend_last_line(self._path)
            self._open()
            handler = _LoudHandler(folder / "log.txt", maxBytes=max_bytes, backupCount=files, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._logger = logging.Logger(f"cvmk.run.{folder}", logging.INFO)
        self._logger.addHandler(handler)

    def write(self, record: Record) -> None:
        """The event as a line of JSON, and its text, if it has one, as a line of the log."""
        self._append(record.to_json())
        text = record.event.text()
        if text is not None:
            self.line(text)

    def event(self, kind: str, **values: Any) -> None:
        """Deprecated: an event without a class. Write a `cvmk.telemetry.schema.Event` instead."""
        warnings.warn("RunLog.event is now RunLog.write: give it a Record of cvmk.telemetry.schema", DeprecationWarning, stacklevel=2)
        self._append({"time": round(time.time(), 3), "event": kind, **values})

    def line(self, text: str) -> None:
        with explained(self._path.with_name("log.txt"), "write"):
            self._logger.info(text)

    def close(self) -> None:
        self._events.close()
        for handler in self._logger.handlers:
            handler.close()
        self._lock.close()

    def _open(self) -> None:
        self._events = open(self._path, "ab", buffering=0)  # what a full disk did not take must not be tried again when the file is closed
        self._size = os.fstat(self._events.fileno()).st_size

    def _append(self, values: dict[str, Any]) -> None:
        line = json.dumps(values, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with explained(self._path, "write"):
            if self._size and self._size + len(line) > self._max_bytes:
                self._rotate()
            self._write(line)
        self._size += len(line)

    def _write(self, line: bytes) -> None:
        """Write all of it, on a line of its own: what stands before may be half a line that the disk had no room for."""
        left = memoryview(b"\n" + line if self._torn else line)
        self._torn = True
        while left:
            left = left[self._events.write(left) :]
        self._torn = False

    def _rotate(self) -> None:
        """Number the full file, drop those that are too many, and begin a new one."""
        self._events.close()
        before = set_aside(self._path)
        last = max(before, default=0) + 1
        os.replace(self._path, self._path.with_name(f"{self._path.stem}.{last}{self._path.suffix}"))
        for number, path in before.items():
            if number <= last - self._files:
                path.unlink(missing_ok=True)
        self._open()


def set_aside(path: Path) -> dict[int, Path]:
    """The files that were set aside when `path` was full, by their numbers, the oldest first."""
    name = re.compile(re.escape(path.stem) + r"\.([1-9]\d*)" + re.escape(path.suffix))
    found = {int(match[1]): entry for entry in path.parent.iterdir() if (match := name.fullmatch(entry.name))}
    return dict(sorted(found.items()))


def _locked(folder: Path) -> Any:
    try:
        return lock(folder / _LOCK)
    except BlockingIOError:
        raise ConfigError(f"another process writes the logs in {folder}: wait for it, stop it, or choose another folder") from None


def _mend_last_line(path: Path) -> None:
    """A run that was killed may leave half a line; the next event must not join it."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
