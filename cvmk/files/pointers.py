"""Small files that stand for a neighbour, as a link would."""

from __future__ import annotations

import os
from pathlib import Path

from cvmk.files.writing import sync_folder

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
