"""Files to read: text of any compression, told by its content, with errors that name the file."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cvmk.errors import DataError
from cvmk.files import compression, encoding

BOM = "\ufeff"


@contextlib.contextmanager
def explained(path: str | os.PathLike[str], action: str) -> Iterator[None]:
    """Turn an OSError into a DataError: "cannot <action> <path>: <reason>". The empty name is one at once: paths would take it for the working directory."""
    if not os.fspath(path):
        raise DataError(f"cannot {action} a file whose name is empty: name a file")
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot {action} {os.fspath(path)}: {reason}") from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    with explained(path, "read"):
        return Path(path).read_bytes()


def read_json(path: str | os.PathLike[str], remedy: str = "restore it or write it again") -> Any:
    """The values in a file of JSON. Raises DataError, with the remedy, for what is none."""
    try:
        return json.loads(read_bytes(path).decode("utf-8").removeprefix(BOM))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and nesting without end
        raise DataError(f"{os.fspath(path)} is not valid JSON ({error}): {remedy}") from error


def read_text(path: str | os.PathLike[str], stream: BinaryIO | None = None) -> str:
    """A UTF-8 text, without a byte order mark; that of `stream` where one is given, and `path` is its name. A pipe is read to its end.

    Raises DataError where it is missing or not UTF-8.
    """
    with open_input(path) if stream is None else contextlib.nullcontext(plain(stream, os.fspath(path))) as file, explained(path, "read"):
        data = file.read()
    try:
        return data.decode("utf-8").removeprefix(BOM)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{os.fspath(path)} is not valid UTF-8 (line {line}, byte {error.start + 1} of the file): convert it to UTF-8") from error


def open_input(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a text for reading as `plain` gives it. Raises DataError where it cannot be opened, too."""
    name = os.fspath(path)
    with contextlib.ExitStack() as stack, explained(path, "read"):
        file = stack.enter_context(open(path, "rb"))
        result = plain(file, name, close=True)
        stack.pop_all()
    return result


def plain(stream: BinaryIO, name: str, *, close: bool = False) -> io.BufferedReader:
    """The text in `stream`, decompressed where its first bytes are those of a compressed file; `name` stands in the errors.

    With `close`, closing the result closes `stream`. Raises DataError where the content is an archive or another encoding than
    UTF-8 by its first bytes, or a module to decompress it is missing; reading from the result raises it where the file is
    truncated or corrupt.
    """
    with explained(name, "read"):
        found = compression.decompressed(stream, name, close=close)
        head = found.peek(encoding.ENOUGH)[: encoding.ENOUGH]
    if other := encoding.other_than_utf8(head):
        raise DataError(f"{name} is {other} text: convert it to UTF-8, for example with `iconv -f {other} -t UTF-8`")
    return found
