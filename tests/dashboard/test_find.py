"""Which runs are meant, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
from event_logs import start, write

from cvmk.dashboard import find
from cvmk.dashboard.board import Board
from cvmk.errors import DataError


def test_a_run_its_teacher_and_a_folder_of_runs(tmp_path: Path) -> None:
    write(tmp_path / "runs/b/teacher", start())
    write(tmp_path / "runs/b", start())
    (tmp_path / "runs/a").mkdir()
    (tmp_path / "runs/a/config.resolved.json").write_text("{}")  # it has just begun
    (tmp_path / "runs/notes").mkdir()
    write(tmp_path / "elsewhere", start())
    (tmp_path / "runs/link").symlink_to(tmp_path / "elsewhere")
    found = [folder.relative_to(tmp_path).as_posix() for folder in find.found(tmp_path / "runs")]
    assert found == ["runs/a", "runs/b", "runs/b/teacher"]
    assert find.names([tmp_path / name for name in ("runs/a", "other/a", "runs/b/teacher", "c")]) == ["runs/a", "other/a", "b/teacher", "c"]
    board = Board([str(tmp_path / "runs"), f"{tmp_path}/runs/../runs/b"])  # once, though named twice
    assert [(run.name, run.is_nested) for run in board.runs] == [("a", False), ("b", False), ("b/teacher", True)]


def test_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, words in (("nowhere", "No such file"), (".", "holds no run"), ("file", "is no folder"), ("", "name is empty")):
        with pytest.raises(DataError, match=words):
            find.check([str(tmp_path / name) if name else ""])
