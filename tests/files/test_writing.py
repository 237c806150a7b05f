from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cvmk.errors import DataError
from cvmk.files import atomic, read_json, write_bytes, write_json, write_text


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


# -- what cannot be replaced, and what must not be ----------------------------------------------------------------------------------
def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    real = tmp_path / "far" / "real"
    real.write_text("old")
    (tmp_path / "link").symlink_to("far/real")
    (tmp_path / "outer").symlink_to(tmp_path / "link")
    with pytest.raises(RuntimeError), atomic(tmp_path / "outer") as file:
        file.write(b"half")
        raise RuntimeError
    assert real.read_text() == "old"
    write_text(tmp_path / "outer", "new")
    assert real.read_text() == "new" and (tmp_path / "outer").is_symlink() and (tmp_path / "link").is_symlink()
    assert os.listdir(real.parent) == ["real"]


def test_a_link_to_nothing_makes_the_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("not/there/yet")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "not/there/yet").read_text() == "new"


def test_links_in_a_circle_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(DataError, match=r"cannot write .*/a: Too many levels"):
        write_text(tmp_path / "a", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"cannot write .*/folder: it is a folder"), atomic(tmp_path / "folder"):
        raise AssertionError("it is told before anything is written")


def test_permissions_of_a_file_that_is_replaced_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "private"
    path.write_text("old")
    path.chmod(0o640)
    write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and path.read_text() == "new"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_the_owner_of_a_file_that_is_replaced_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    path.write_text("old")
    os.chown(path, 1234, 2345)
    write_text(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


def test_a_fifo_is_written_to(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    write_text(fifo, "through")
    reader.join(10)
    assert got == [b"through"] and stat.S_ISFIFO(fifo.stat().st_mode) and os.listdir(tmp_path) == ["fifo"]


def test_a_fifo_whose_reader_goes_away(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BrokenPipeError), atomic(fifo) as file:
        os.close(reader)
        file.write(bytes(1 << 20))


@pytest.mark.usefixtures("devices")
def test_devices_are_written_to(tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in ("/dev/null", tmp_path / "link"):
        write_text(path, "gone")
    after = os.stat("/dev/null")
    assert stat.S_ISCHR(after.st_mode) and (before.st_ino, before.st_rdev) == (after.st_ino, after.st_rdev)
    with pytest.raises(DataError, match=r"cannot write /dev/full: No space left"):
        write_text("/dev/full", "x")


WRITE_TO = "import sys; from cvmk.files import write_text; print('first', flush=True); write_text(sys.argv[1], 'second\\n')"


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_standard_output_by_name(tmp_path: Path, name: str) -> None:
    """As a pipe and as a file that is appended to: nothing that was printed is lost, and no other file appears."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    command = [sys.executable, "-c", WRITE_TO, name]
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout == b"first\nsecond\n"
    (tmp_path / "log").write_text("zeroth\n")
    number = (tmp_path / "log").stat().st_ino
    with open(tmp_path / "log", "ab") as log:
        subprocess.run(command, cwd=tmp_path, stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "zeroth\nfirst\nsecond\n" and (tmp_path / "log").stat().st_ino == number
    assert sorted(os.listdir(tmp_path)) == ["link", "log"]


def test_long_names(tmp_path: Path) -> None:
    for name in ("n" * 255, "\u3042" * 85):
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"
