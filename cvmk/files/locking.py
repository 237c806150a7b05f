"""Locks between processes that die with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
import os
from typing import TextIO


def lock(path: str | os.PathLike[str]) -> TextIO:
    """Make the file `path`, if it is not there, and lock it until what is returned is closed (it is a context manager), or the process ends.

    What is locked is the file that `path` names then: whoever holds a lock may rename or remove its file. Raises BlockingIOError where another process,
    or another call in this one, holds it, and OSError where the file cannot be made.
    """
    while True:
        file = open(path, "a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, file):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_at(path: str | os.PathLike[str], file: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
