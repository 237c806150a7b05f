"""Files that are written whole or not at all, and read with errors that name the file; small files that stand for a neighbour."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cvmk.errors import DataError


@contextlib.contextmanager
def explained(path: str | os.PathLike[str], action: str) -> Iterator[None]:
    """Turn an OSError into a DataError: "cannot <action> <path>: <reason>"."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot {action} {os.fspath(path)}: {reason}") from error


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only after it was written whole: temporary name, fsync, rename.

    Raises DataError where the file cannot be written; what stood under `path` before is then untouched.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        with explained(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            temporary = None
            sync_folder(path.parent)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


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


# -- pointers -------------------------------------------------------------------------------------------------------------------
_POINTER_BYTES = 255


def write_pointer(path: str | os.PathLike[str], name: str) -> None:
    """Let `path` stand for its neighbour `name`, by a small file that holds the name: many file systems and copies know no links.

    A file, a pointer or a symbolic link that stood there is replaced, a folder is not (OSError).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.pointer")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def pointed(path: str | os.PathLike[str]) -> str | None:
    """The name of the neighbour that `path` stands for: by a file of `write_pointer`, or by a symbolic link, as cvmk wrote them once.

    None where it is neither, or names something elsewhere.
    """
    path = Path(path)
    try:
        if path.is_symlink():
            name = os.readlink(path)
        elif path.is_file() and path.stat().st_size <= _POINTER_BYTES:
            name = path.read_text(encoding="utf-8").strip()
        else:
            return None
    except (OSError, ValueError):
        return None
    return name if Path(name).name == name and "\0" not in name else None


def followed(path: str | os.PathLike[str]) -> Path:
    """The folder beside `path` that the pointer `path` names; `path` itself where it is no pointer to a folder."""
    path = Path(path)
    name = None if path.is_dir() else pointed(path)
    return path.with_name(name) if name and path.with_name(name).is_dir() else path


# -- reading --------------------------------------------------------------------------------------------------------------------
def read_bytes(path: str | os.PathLike[str]) -> bytes:
    with explained(path, "read"):
        return Path(path).read_bytes()


def read_json(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{os.fspath(path)} is not valid JSON ({error}): restore it or write it again") from error


def open_maybe_gzip(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a plain or gzip-compressed (.gz) file for reading bytes."""
    with explained(path, "read"):
        if Path(path).suffix == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        return open(path, "rb")


_known_umask: int | None = None


def _umask() -> int:
    global _known_umask
    if _known_umask is None:  # reading it means setting it, so it is read once
        _known_umask = os.umask(0)
        os.umask(_known_umask)
    return _known_umask
