"""The files and standard streams that a verb reads and writes; "-" is a standard stream everywhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import BinaryIO

from cvmk.errors import DataError
from cvmk.files import atomic, plain, read_text
from cvmk.text.lines import decode_line, text_lines

STANDARD_INPUT = "standard input"


def is_standard(path: str | None) -> bool:
    """Whether an option that names a file means the standard stream."""
    return path in (None, "-")


def need_open(stream: object, name: str, remedy: str = "open it") -> None:
    """Raises DataError where `stream`, standard `name`, was closed when the process began: what is printed would be lost without a word."""
    if stream is None:
        raise DataError(f"standard {name} is closed: {remedy}")


def standard_input() -> BinaryIO:
    """Standard input, decompressed where it is compressed. Waits for its first bytes. Raises DataError as `cvmk.files.plain` does."""
    need_open(sys.stdin, "input")
    return plain(sys.stdin.buffer, STANDARD_INPUT)


def read_whole(path: str) -> tuple[str, str]:
    """The text in the file `path`, or on standard input, and its name for messages. Raises DataError as `cvmk.files.read_text` does."""
    if not is_standard(path):
        return read_text(path), path
    need_open(sys.stdin, "input")
    return read_text(STANDARD_INPUT, sys.stdin.buffer), STANDARD_INPUT


def each_line(path: str) -> Iterator[str]:
    """The lines of a UTF-8 text, plain or compressed, without line ends, as they are read. Raises DataError: missing, empty, not UTF-8 (with the line),
    corrupt."""
    name = STANDARD_INPUT if is_standard(path) else path
    for number, line in enumerate(text_lines(name, standard_input() if is_standard(path) else None), 1):
        try:
            yield decode_line(line.removesuffix(b"\r"))
        except UnicodeDecodeError as error:
            raise DataError(f"{name} line {number} is not valid UTF-8 (byte {error.start + 1}): convert the file to UTF-8") from error


def read_lines(path: str) -> list[str]:
    """`each_line`, all of them."""
    return list(each_line(path))


@contextlib.contextmanager
def output(path: str | None) -> Iterator[BinaryIO]:
    """The file `path`, as `cvmk.files.atomic` writes it, or standard output."""
    if path is not None and not is_standard(path):
        with atomic(path) as file:
            yield file
    else:
        need_open(sys.stdout, "output")
        yield sys.stdout.buffer
