"""The runs that are meant by a folder: itself, and those in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cvmk.errors import DataError
from cvmk.files import explained
from cvmk.telemetry.events import EVENTS, set_aside

RUNS = 200
"""Runs that are followed at most."""
_DEPTH = 2
_IS_RUN = "config.resolved.json"
"""What `cvmk train` writes first: its log comes later."""


def check(paths: Sequence[str]) -> None:
    """Raises DataError for a folder that is not there, or that neither is a run nor holds one."""
    for path in paths:
        with explained(path, "read"):
            os.stat(path)
            if not os.path.isdir(path):
                raise DataError(f"{path} is no folder: name the folder of a run of cvmk train")
            os.scandir(path).close()
        if not any(found(path)):
            raise DataError(f"{path} holds no run (no events.jsonl in it or in its folders): name the folder of a run of cvmk train")


def found(path: str | os.PathLike[str], depth: int = _DEPTH) -> Iterator[Path]:
    """The run in a folder, and those in its folders: a teacher's, trials of a search, `runs/`. No link is followed on the way down."""
    folder = Path(path)
    if _is_run(folder):
        yield folder
    if depth:
        try:
            with os.scandir(folder) as entries:
                inner = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."))
        except OSError:
            return
        for one in inner:
            yield from found(one, depth - 1)


def _is_run(folder: Path) -> bool:
    try:
        return (folder / _IS_RUN).is_file() or (folder / EVENTS).is_file() or bool(set_aside(folder / EVENTS))
    except OSError:
        return False


def names(folders: Sequence[Path]) -> list[str]:
    """What to call runs: as much of the ends of their paths as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    shown = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        if own[-1] == "teacher" and length == 1:
            length = 2
        shown.append("/".join(own[-length:]))
    return shown
