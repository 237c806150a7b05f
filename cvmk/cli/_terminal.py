"""What a verb prints: safe whatever the encoding of the standard streams, and whoever stops reading them.

Characters that a stream's encoding lacks are replaced, unless PYTHONIOENCODING asks for something else. JSON is lossless on any stream.
A text that is data (the output of `cvmk translate`, any file) does not come here: it is UTF-8 always.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

_STRICT = ("strict", "surrogateescape")
"""How Python's standard streams treat a character without a code, if nobody asks for another way: with a UnicodeEncodeError."""

_NOT_ASCII = re.compile("[^\\x00-\\x7f]")


class _Courtesy(io.FileIO):
    """A file that nothing depends on: what cannot be written is lost, and nobody fails for it (a log's reader that went away, a full disk)."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def prepare() -> None:
    """Make the standard streams ready for whatever is printed. Called first, once or more often."""
    _occupy_closed_descriptors()
    if type(sys.stderr) is io.TextIOWrapper and sys.stderr is sys.__stderr__:  # nobody has put another in its place
        file = io.BufferedWriter(_Courtesy(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(file, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _STRICT:
            stream.reconfigure(errors="replace")


def _occupy_closed_descriptors() -> None:
    """Where a standard stream was closed, the next file that is opened must not become it and get what is printed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:  # print(file=None) would mean standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows with their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def show(text: str) -> None:
    """Print a result. Where its reader went away the verb goes on in silence, for its exit code says something too."""
    try:
        print(as_text(text))
        flush()
    except BrokenPipeError:
        discard()


def show_json(value: Any, *, indent: int | None = 2) -> None:
    """Print one JSON value; on a stream that is not UTF-8 it is spelt in ASCII."""
    text = as_text(json.dumps(value, ensure_ascii=False, indent=indent))
    if not _is_utf8(sys.stdout):
        text = _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text)
    show(text)


def complain(text: object) -> None:
    """One sentence on standard error."""
    print(f"cvmk: {as_text(str(text))}", file=sys.stderr)


def as_text(typed: str) -> str:
    """Text without surrogates. Python hands over the bytes of an argument or a file's name that the locale's encoding does not have as surrogates;
    they are taken for the UTF-8 that they mostly are."""
    try:
        typed.encode()
    except UnicodeEncodeError:
        escaped = "surrogateescape" if all("\udc80" <= character <= "\udcff" for character in typed if "\ud800" <= character <= "\udfff") else "replace"
        return typed.encode("utf-8", escaped).decode("utf-8", "replace")
    return typed


def flush() -> None:
    """Write what was printed. Raises OSError where that fails."""
    if sys.stdout is not None:
        sys.stdout.flush()


def settle() -> None:
    """At the end: what cannot be written any more is dropped, so that the interpreter does not complain about it after the verb has said what it has to."""
    try:
        flush()
    except OSError:
        discard()


def discard() -> None:
    """Whatever is still printed on standard output goes nowhere."""
    if sys.stdout is not None:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


def _is_utf8(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("_", "-") in ("utf-8", "utf8")
