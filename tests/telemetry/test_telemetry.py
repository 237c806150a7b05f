from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from cvmk.errors import DataError
from cvmk.telemetry import Record, Reporter, RunLog, environment, read_events
from cvmk.telemetry.console import duration
from cvmk.telemetry.schema import Note, Resumed, Step


def test_events_are_one_json_object_a_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write(Record.now(Step(1, 1e-3, 1.0, 1.0, 2.5)))
    log.line("step 1")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]  # readable while the run goes on
    log.close()
    assert events[0]["event"] == "step" and events[0]["loss"] == 2.5
    assert "step 1" in (tmp_path / "log.txt").read_text()


def test_half_a_line_of_a_killed_run_stays_alone(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "ste')
    log = RunLog(tmp_path)
    log.write(Record.now(Resumed(1)))
    log.close()
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["event"] == "resumed"


def test_a_full_disk_is_not_ignored(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(DataError, match=r"events\.jsonl"):
            log.write(Record.now(Note("x" * 1000)))
        with pytest.raises(DataError, match=r"log\.txt"):
            log.line("x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write(Record.now(Note("there is room again")))
    log.close()
    records, problems = read_events(tmp_path / "events.jsonl")
    assert [record.event for record in records] == [Note("there is room again")] and len(problems) == 1


def test_a_log_is_closed_on_a_full_disk(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(DataError, match=r"events\.jsonl"):
            log.write(Record.now(Note("x" * 1000)))
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_plain_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter().progress("student", 10) as bar:
        bar.update(1, "loss 3")
        bar.update(2, "loss 2", log=True)
    text = capsys.readouterr().err
    assert "student 2/10  loss 2" in text and "loss 3" not in text


def test_durations_and_environment() -> None:
    assert [duration(5), duration(65), duration(3725)] == ["0:05", "1:05", "1:02:05"]
    assert environment()["packages"]["torch"] is not None
    json.dumps(environment())


def test_events_without_a_class_still_work(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    with pytest.warns(DeprecationWarning, match=r"RunLog\.write"):
        log.event("mine", value=1)
    log.close()
    assert json.loads((tmp_path / "events.jsonl").read_text())["value"] == 1
