"""Lines of text files, as every reader of text takes them.

A line ends at \\n only, so characters such as U+2028 or \\x0b cannot shift the alignment. Byte order marks are dropped wherever
they stand (`cat a b` puts the one of b in the middle); Unicode has no other use for U+FEFF any more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from cvmk.errors import DataError
from cvmk.files import explained, open_input
from cvmk.files.reading import BOM


def text_lines(path: str | os.PathLike[str], stream: BinaryIO | None = None) -> Iterator[bytes]:
    """The lines of a file without their \\n, decompressed where it is compressed; of `stream` where one is given, and `path` is its name.

    Raises DataError for a file that is missing, empty, truncated, corrupt, or of another encoding by its first bytes.
    """
    empty = True
    with explained(path, "read"), contextlib.nullcontext(stream) if stream is not None else open_input(path) as file:
        for line in file:
            empty = False
            yield line.removesuffix(b"\n")
    if empty:
        raise DataError(f"{os.fspath(path)} is empty: give a file with one sentence a line")


def decode_line(line: bytes) -> str:
    """The text of a line. Raises UnicodeDecodeError where it is not UTF-8."""
    text = line.decode()
    return text.replace(BOM, "") if BOM in text else text


def trimmed(text: str) -> str:
    """A sentence as models read it: without byte order marks, and without white space around it."""
    return text.replace(BOM, "").strip()


def one_line(text: str) -> str:
    """`text` with its line breaks as spaces, so that it is one line for every reader of lines; nothing else is changed."""
    return text.replace("\n", " ").replace("\r", " ")
