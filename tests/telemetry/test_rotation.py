"""Logs that go on in new files: nothing is lost but what is too old, whoever reads meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cvmk.errors import ConfigError, DataError
from cvmk.telemetry import EventReader, Record, RunLog, read_events
from cvmk.telemetry.schema import EarlyStop, Note


def write(log: RunLog, *steps: int) -> None:
    for step in steps:
        log.write(Record(1.0, EarlyStop(step)))


def steps(records: list[Record]) -> list[int]:
    return [record.event.step for record in records if isinstance(record.event, EarlyStop)]


LINE = len(json.dumps(Record(1.0, EarlyStop(10)).to_json())) + 1


def test_files_are_full_and_few(tmp_path: Path) -> None:
    log = RunLog(tmp_path, max_bytes=3 * LINE, files=2)
    write(log, *range(10, 30))
    log.close()
    assert sorted(path.name for path in tmp_path.glob("events*")) == ["events.5.jsonl", "events.6.jsonl", "events.jsonl"]
    assert all(path.stat().st_size <= 3 * LINE for path in tmp_path.glob("events*"))
    assert sorted(path.name for path in tmp_path.glob("log.txt*")) == ["log.txt", "log.txt.1", "log.txt.2"]
    records, problems = read_events(tmp_path / "events.jsonl")
    assert steps(records) == list(range(22, 30))
    assert problems == [f"{tmp_path / 'events.jsonl'}: what was written before events.5.jsonl is no longer there"]


def test_a_line_that_is_longer_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    log = RunLog(tmp_path, max_bytes=100, files=5)
    for text in ("x" * 300, "y", "z" * 300):
        log.write(Record(1.0, Note(text)))
    log.close()
    assert [record.event.text() for record in read_events(tmp_path / "events.jsonl")[0]] == ["x" * 300, "y", "z" * 300]


def test_a_run_that_goes_on_goes_on_in_its_log(tmp_path: Path) -> None:
    for start in (10, 20, 30):
        log = RunLog(tmp_path, max_bytes=4 * LINE, files=20)
        write(log, *range(start, start + 10))
        log.close()
        with open(tmp_path / "events.jsonl", "a") as file:  # as where it was killed
            file.write('{"time": 1, "eve')
    records, problems = read_events(tmp_path / "events.jsonl")
    assert steps(records) == list(range(10, 40))
    assert len(problems) == 3 and "events.3.jsonl line 3 is left out: it is no JSON" in problems[0] and problems[2].endswith("is cut off: it is left out")


@pytest.mark.parametrize("every", [1, 2, 7, 50])
def test_a_reader_follows_through_rotations(tmp_path: Path, every: int) -> None:
    log, reader, read = RunLog(tmp_path, max_bytes=3 * LINE, files=100), EventReader(tmp_path / "events.jsonl"), []
    for step in range(10, 99):
        write(log, step)
        if step % every == 0:
            read += steps(reader.read())
    read += steps(reader.read())
    assert read == list(range(10, 99)) and reader.problems() == [] and reader.read() == []


def test_a_reader_that_comes_too_late_says_so(tmp_path: Path) -> None:
    log, reader = RunLog(tmp_path, max_bytes=3 * LINE, files=2), EventReader(tmp_path / "events.jsonl")
    write(log, 10, 11)
    assert steps(reader.read()) == [10, 11] and reader.problems() == []
    write(log, *range(12, 40))
    late = steps(reader.read())
    assert late == list(range(late[0], 40)) and late[0] > 12
    assert len(reader.problems()) == 1 and "no longer there" in reader.problems()[0]


def test_a_reader_beside_a_writer(tmp_path: Path) -> None:
    log, reader, read, done = RunLog(tmp_path, max_bytes=6 * LINE, files=1000), EventReader(tmp_path / "events.jsonl"), [], threading.Event()

    def writes() -> None:
        write(log, *range(600))
        done.set()

    thread = threading.Thread(target=writes)
    thread.start()
    while not done.is_set():
        read += steps(reader.read())
    thread.join()
    read += steps(reader.read())
    assert read == list(range(600)) and reader.problems() == []


def test_the_middle_of_an_older_file_is_cut_out(tmp_path: Path) -> None:
    log = RunLog(tmp_path, max_bytes=3 * LINE, files=20)
    write(log, *range(10, 20))
    log.close()
    os.truncate(tmp_path / "events.2.jsonl", LINE + 5)
    records, problems = read_events(tmp_path / "events.jsonl")
    assert steps(records) == [10, 11, 12, 13, 16, 17, 18, 19]
    assert problems == [f"{tmp_path / 'events.2.jsonl'} line 2 is left out: it is cut off"]


def test_a_file_that_is_made_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    path, reader = tmp_path / "events.jsonl", EventReader(tmp_path / "events.jsonl")
    line = json.dumps(Record(1.0, EarlyStop(1)).to_json()) + "\n"
    path.write_text(line * 3)
    assert len(reader.read()) == 3
    path.write_text(line)
    assert len(reader.read()) == 1


def test_a_long_log_comes_in_pieces(tmp_path: Path) -> None:
    """Lines that are longer than a piece too; and no piece ends within a line."""
    log, reader = RunLog(tmp_path, max_bytes=50 * LINE, files=20), EventReader(tmp_path / "events.jsonl")
    write(log, *range(10, 99))
    log.write(Record(1.0, Note("x" * 20 * LINE)))
    write(log, 99)
    log.close()
    pieces, progress = [], []
    while (piece := reader.read(3 * LINE)) or reader.progress < 1:
        pieces.append(piece)
        progress.append(reader.progress)
    assert steps([record for piece in pieces for record in piece]) == list(range(10, 100))
    assert max(map(len, pieces)) <= 3 and len(pieces) > 30 and progress == sorted(progress) and progress[0] < 0.1
    assert reader.progress == 1 and reader.problems() == []


def test_a_log_that_is_cut_rewritten_or_replaced_is_told(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [json.dumps(Record(1.0, EarlyStop(step)).to_json()).encode() + b"\n" for step in range(10, 20)]

    def again(reader: EventReader) -> list[int]:
        found = steps(reader.read())
        assert reader.anew and not reader.read() and not reader.anew
        return found

    reader = EventReader(path)
    path.write_bytes(b"".join(lines[:3]))
    assert steps(reader.read()) == [10, 11, 12] and not reader.anew
    os.truncate(path, LINE + 5)
    assert again(reader) == [10]
    with open(path, "r+b") as file:  # in place, and longer
        file.write(b"".join(lines[5:]))
    assert again(reader) == [15, 16, 17, 18, 19]
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        reader.read()
    path.write_bytes(lines[7])
    assert again(reader) == [17]
    with open(path, "ab") as file:
        file.write(lines[8])
    path.rename(tmp_path / "events.1.jsonl")
    path.write_bytes(lines[9])
    assert steps(reader.read()) == [18, 19] and not reader.anew


def test_a_pipe_is_no_log(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "events.jsonl")
    with pytest.raises(DataError, match=r"cannot read .*events\.jsonl"):
        read_events(tmp_path / "events.jsonl")


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "events.x.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"events\.jsonl: No such file"):
        read_events(tmp_path / "events.jsonl")


HOLD = """
import sys, time
from pathlib import Path
from cvmk.telemetry import RunLog
log = RunLog(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process writes the logs in"):
            RunLog(tmp_path)
    finally:
        other.kill()
        other.wait()
    log = RunLog(tmp_path)  # its lock has died with it
    write(log, 1)
    log.close()
    assert steps(read_events(tmp_path / "events.jsonl")[0]) == [1]
