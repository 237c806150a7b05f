"""The server's log: a line of JSON an event, with the session that it belongs to.

Nothing that a client wrote is in it. An exception's own text may quote that, so that only its type and its places in the code are written; of other packages'
messages, whose arguments are unknown, only the beginning of the template.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

_SESSION: ContextVar[str | None] = ContextVar("cvmk_session", default=None)
_OWN = "cvmk"
_DEPTH = 12  # places of an exception, the innermost
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextlib.contextmanager
def session(name: str) -> Iterator[None]:
    """Every line that is written inside, and by tasks that are made inside, belongs to this session."""
    token = _SESSION.set(name)
    try:
        yield
    finally:
        _SESSION.reset(token)


def current_session() -> str | None:
    return _SESSION.get()


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, logger, message, session (null outside of one), and what `extra` had. Lines have no user's text as
    long as cvmk's own messages have none, which is their rule."""

    def format(self, record: logging.LogRecord) -> str:
        own = record.name == _OWN or record.name.startswith(_OWN + ".")
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage() if own else _stem(str(record.msg)),
            "session": getattr(record, "session", None) or _SESSION.get(),
        }
        if own:
            line |= {key: value for key, value in vars(record).items() if key not in _STANDARD and key not in line}
        if record.exc_info and (error := record.exc_info[1]) is not None:
            line |= described(error)
        return json.dumps(line, ensure_ascii=True, default=lambda value: type(value).__name__)


def described(error: BaseException) -> dict[str, Any]:
    """An exception, and what it came from, by types and places alone."""
    places = traceback.extract_tb(error.__traceback__)[-_DEPTH:]
    found = {"error": type(error).__name__, "at": [f"{_short(place.filename)}:{place.lineno} {place.name}" for place in places]}
    cause = error.__cause__ or error.__context__
    causes: list[str] = []
    while cause is not None and len(causes) < _DEPTH:
        causes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return found | ({"from": causes} if causes else {})


def _stem(message: str) -> str:
    """A message up to where values may begin that somebody has put in."""
    return re.split(r"[\n({<'\"]", message, maxsplit=1)[0].strip()


def _short(file: str) -> str:
    """The last three parts of a file's name."""
    return "/".join(file.replace("\\", "/").split("/")[-3:])


def start(stream: TextIO | None = None, level: int = logging.INFO) -> logging.Handler:
    """Write all logs of the process to `stream` (stderr) as lines of JSON, those of other packages from warnings on. Gives the handler, for `stop`."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(_OWN).setLevel(level)
    return handler


def stop(handler: logging.Handler) -> None:
    logging.getLogger().removeHandler(handler)
    handler.close()


def watch(loop: asyncio.AbstractEventLoop) -> None:
    """Log what nobody caught in `loop`. asyncio's own handler would print the exception and the task, with what they hold of a client's text."""

    def unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        message = _stem(str(context.get("message", "")))
        logging.getLogger(__name__).error("the event loop: %s", message, exc_info=None if error is None else (type(error), error, error.__traceback__))

    loop.set_exception_handler(unhandled)
