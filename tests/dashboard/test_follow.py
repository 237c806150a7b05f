"""A log that grows, is rotated, cut, rewritten or replaced while it is followed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cvmk.dashboard import follow
from cvmk.dashboard.follow import Follower, Piece
from cvmk.telemetry import Record, RunLog
from cvmk.telemetry.schema import Note


def everything(follower: Follower) -> list[bytes]:
    """What comes until nothing does; a beginning anew is b"ANEW"."""
    found: list[bytes] = []
    for _ in range(100):
        piece = follower.read()
        if piece.anew:
            found.append(b"ANEW")
        elif not piece.lines:
            break
        found += piece.lines
    return found


def test_only_what_was_appended_is_read_and_half_a_line_waits(tmp_path: Path) -> None:
    log, follower = tmp_path / "events.jsonl", Follower(tmp_path)
    assert follower.read() == Piece([])  # it is waited for
    log.write_bytes(b"1\n2\n3")
    assert everything(follower) == [b"1", b"2"]
    with open(log, "ab") as file:
        file.write(b"33\n4\n")
        file.flush()
        assert everything(follower) == [b"333", b"4"]
    assert follower.progress() == 1.0


def test_a_long_log_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "PIECE", 10)
    (tmp_path / "events.jsonl").write_bytes(b"".join(b"%d\n" % number for number in range(30)))
    follower = Follower(tmp_path)
    assert len(follower.read().lines) == 5 and 0 < follower.progress() < 0.5
    assert everything(follower) == [b"%d" % number for number in range(5, 30)]


def test_a_rotated_log_is_read_on(tmp_path: Path) -> None:
    """However often between two looks; and one that was rotated before is read from its oldest file on."""
    log = tmp_path / "events.jsonl"
    (tmp_path / "events.9.jsonl").write_bytes(b"1\n")
    (tmp_path / "events.10.jsonl").write_bytes(b"2\n")
    (tmp_path / "events.old.jsonl").write_bytes(b"no part of it\n")
    log.write_bytes(b"3\n")
    follower = Follower(tmp_path)
    assert everything(follower) == [b"1", b"2", b"3"]
    with open(log, "ab") as file:
        file.write(b"4\n5")  # and then the run is killed
    log.rename(tmp_path / "events.11.jsonl")
    (tmp_path / "events.12.jsonl").write_bytes(b"6\n")
    (tmp_path / "events.9.jsonl").unlink()
    log.write_bytes(b"7\n")
    assert everything(follower) == [b"4", b"5", b"6", b"7"]
    assert follower.progress() == 1.0


def test_what_the_runs_log_writes_is_read_through_its_rotations(tmp_path: Path) -> None:
    log, follower = RunLog(tmp_path, max_bytes=500), Follower(tmp_path)
    found = []
    for number in range(100):
        log.write(Record(0.0, Note(str(number))))
        if number % 17 == 0:
            found += everything(follower)
    log.close()
    found += everything(follower)
    assert [json.loads(line)["message"] for line in found] == [str(number) for number in range(100)]
    assert len(list(tmp_path.glob("events.*.jsonl"))) > 10


def test_a_log_that_was_cut_or_rewritten_is_read_anew(tmp_path: Path) -> None:
    log, follower = tmp_path / "events.jsonl", Follower(tmp_path)
    log.write_bytes(b"1\n2\n3\n")
    assert everything(follower) == [b"1", b"2", b"3"]
    os.truncate(log, 4)
    assert everything(follower) == [b"ANEW", b"1", b"2"]
    with open(log, "r+b") as file:  # in place, and longer
        file.write(b"4\n5\n6\n7\n")
    assert everything(follower) == [b"ANEW", b"4", b"5", b"6", b"7"]


def test_a_log_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    log, follower = tmp_path / "events.jsonl", Follower(tmp_path)
    log.write_bytes(b"1\n")
    assert everything(follower) == [b"1"]
    log.unlink()
    assert everything(follower) == []
    log.write_bytes(b"1\n2\n")
    assert everything(follower) == [b"ANEW", b"1", b"2"]


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "events.jsonl")
    assert Follower(tmp_path).read() == Piece([])


def test_a_line_without_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "PIECE", 10)
    monkeypatch.setattr(follow, "LONGEST", 20)
    (tmp_path / "events.jsonl").write_bytes(b"x" * 200 + b"\n1\n")
    follower = Follower(tmp_path)
    found = [line for _ in range(40) for line in follower.read().lines]
    assert found[-1] == b"1" and len(found) == 2 and len(found[0]) <= 31
