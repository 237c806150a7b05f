from __future__ import annotations

import gzip
import os
import resource
from pathlib import Path

import pytest

from cvmk.errors import DataError
from cvmk.files import atomic, open_maybe_gzip, read_bytes, read_json, write_bytes, write_json, write_text


def test_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"ä": [1]})
    assert read_json(path) == {"ä": [1]}
    assert os.listdir(path.parent) == ["a.json"]


def test_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write .*a\.txt"):
            write_bytes(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_unwritable_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "x")


def test_reading_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nothing"):
        read_bytes(tmp_path / "nothing")
    (tmp_path / "bad.json").write_bytes(b'{"a": ')
    with pytest.raises(DataError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b'"\xff"')
    with pytest.raises(DataError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json")


def test_gzip_or_plain(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text\n")
    with gzip.open(tmp_path / "a.gz", "wb") as file:
        file.write(b"text\n")
    for name in ("a", "a.gz"):
        with open_maybe_gzip(tmp_path / name) as file:
            assert file.read() == b"text\n"
