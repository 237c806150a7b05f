"""The two logs of a run: `events.jsonl` for programs, `log.txt` (rotating) for people."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import time
import warnings
from pathlib import Path
from typing import Any

from cvmk.files import explained
from cvmk.telemetry.schema import Record

EVENTS = "events.jsonl"
_LOG_BYTES = 2_000_000
_LOG_FILES = 3


class _LoudHandler(logging.handlers.RotatingFileHandler):
    """A handler that lets a full disk stop the run instead of printing a traceback and going on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


class RunLog:
    """Appends to the logs in `folder`. A line is written and flushed at once. Raises DataError where that fails."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS
        with explained(folder, "write the logs in"):
            folder.mkdir(parents=True, exist_ok=True)
            self._mend_last_line()
            self._events = open(self._path, "a", encoding="utf-8")
            handler = _LoudHandler(folder / "log.txt", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._logger = logging.Logger(f"cvmk.run.{folder}", logging.INFO)
        self._logger.addHandler(handler)

    def _mend_last_line(self) -> None:
        """A run that was killed may leave half a line; the next event must not join it."""
        if self._path.exists() and self._path.stat().st_size:
            with open(self._path, "rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")

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

    def _append(self, values: dict[str, Any]) -> None:
        with explained(self._path, "write"):
            self._events.write(json.dumps(values, ensure_ascii=False) + "\n")
            self._events.flush()
