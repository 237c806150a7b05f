"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cvmk.errors import DataError
from cvmk.files.reading import explained

_OPEN_FILE = re.compile(r"/proc/(self|\d+)(/task/\d+)?/fd")  # a folder of links to the open files of a process


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only after it was written whole: temporary name, fsync, rename.

    A link is followed, and what it points at is replaced; a file that is replaced keeps its permissions. What cannot be
    replaced is written to as it is: a device, a pipe, an open file of this process (/dev/stdout, /dev/fd/3). Raises DataError where
    the file cannot be written; a regular file that stood there is then untouched. A pipe whose reader went away is a BrokenPipeError.
    """
    with explained(path, "write"):
        path = Path(path)
        target = _to_replace(path)
    with _written_directly(path) if target is None else _written_aside(path, target) as file:
        yield file


def _to_replace(path: Path) -> Path | None:
    """The regular file, there or not, that `path` names after all links; None where it is something to be written to as it is."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise DataError(f"cannot write {path}: it is a folder; name a file")
    if not stat.S_ISREG(mode) or _is_open_file(path):
        return None
    return Path(os.path.realpath(path))


def _is_open_file(path: Path) -> bool:
    """Whether the links from `path` on lead through a process's open files: /dev/stdout, /dev/fd/3, /proc/self/fd/3."""
    place = os.path.abspath(path)
    while not _OPEN_FILE.fullmatch(folder := os.path.realpath(os.path.dirname(place))):
        if not os.path.islink(place):
            return False
        place = os.path.join(folder, os.readlink(place))
    return True


@contextlib.contextmanager
def _written_directly(path: Path) -> Iterator[BinaryIO]:
    """Without O_CREAT, which some systems refuse for another user's pipe; with O_APPEND, because /dev/stdout may be a file that is not empty."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC), "wb") as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _written_aside(path: Path, target: Path) -> Iterator[BinaryIO]:
    temporary: str | None = None
    try:
        with explained(path, "write"):
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name[:40]}.", dir=target.parent)
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _take_permissions(temporary, target)
            os.replace(temporary, target)
            temporary = None
            sync_folder(target.parent)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _take_permissions(temporary: str, target: Path) -> None:
    """Give a new file the permissions (and, where that is allowed, the owner) of the file that it replaces, or those that any new file gets."""
    try:
        before = target.stat()
    except FileNotFoundError:
        os.chmod(temporary, 0o666 & ~_umask())
        return
    now = os.stat(temporary)
    if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
        with contextlib.suppress(OSError):
            os.chown(temporary, before.st_uid, before.st_gid)
    os.chmod(temporary, stat.S_IMODE(before.st_mode) & 0o777)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames inside `folder` durable, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # network and user-space file systems without such a call
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    with atomic(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


_known_umask: int | None = None


def _umask() -> int:
    global _known_umask
    if _known_umask is None:  # reading it means setting it, so it is read once
        _known_umask = os.umask(0)
        os.umask(_known_umask)
    return _known_umask
