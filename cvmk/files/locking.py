"""Locks between processes that die with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
import os
from typing import TextIO


def lock(path: str | os.PathLike[str]) -> TextIO:
    """Make the file `path`, if it is not there, and lock it until what is returned is closed (it is a context manager), or the process ends.

    Raises BlockingIOError where another process, or another call in this one, holds it, and OSError where the file cannot be made.
    """
    file = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file
