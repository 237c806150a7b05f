"""Whoever looks on cannot harm a run; what cannot be recorded stops it."""

from __future__ import annotations

import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from cvmk.errors import DataError
from cvmk.telemetry import EventStream, Record, Reporter, RunLog, Terminal, read_events, stream
from cvmk.telemetry.schema import EarlyStop, Event, Note, Rollback, Start, Step, Validation


class Listener:
    def __init__(self) -> None:
        self.heard: list[Event] = []
        self.closed = False

    def receive(self, record: Record) -> None:
        self.heard.append(record.event)

    def close(self) -> None:
        self.closed = True


class Failing(Listener):
    def receive(self, record: Record) -> None:
        super().receive(record)
        raise SystemExit("no")


class Blocking(Listener):
    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def receive(self, record: Record) -> None:
        self.released.wait()
        super().receive(record)


def texts(folder: Path) -> list[str]:
    return [record.event.message for record in read_events(folder / "events.jsonl")[0] if isinstance(record.event, Note)]


def test_subscribers_hear_everything_in_order(tmp_path: Path) -> None:
    one, other = Listener(), Listener()
    events = EventStream(RunLog(tmp_path), [one, other])
    sent = [EarlyStop(step, "x") for step in range(100)]
    for event in sent:
        events.emit(event)
    events.notice("seen, not recorded")
    events.close()
    assert one.heard[:-1] == other.heard[:-1] == sent and one.closed and other.closed
    assert len(read_events(tmp_path / "events.jsonl")[0]) == 100


def test_one_that_fails_is_left_and_named(tmp_path: Path) -> None:
    bad, good = Failing(), Listener()
    events = EventStream(RunLog(tmp_path), [bad, good])
    events.emit(EarlyStop(1))
    bad_thread = next(thread for thread in threading.enumerate() if "Failing" in thread.name)
    bad_thread.join(5)
    events.emit(EarlyStop(2))
    events.close()
    assert len(bad.heard) == 1 and bad.closed
    assert texts(tmp_path) == ["the subscriber Failing failed (SystemExit: no); the run goes on without it"]
    assert [event.text() for event in good.heard if isinstance(event, Note)] == texts(tmp_path)
    assert "Failing failed" in (tmp_path / "log.txt").read_text()


def test_one_that_blocks_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_WAITING", 50)
    monkeypatch.setattr(stream, "_CLOSING_SECONDS", 0.2)
    blocked, good = Blocking(), Listener()
    events = EventStream(RunLog(tmp_path), [blocked, good])
    for step in range(200):
        events.emit(EarlyStop(step))
        while len(good.heard) < step:  # only the blocked one is to lose something
            time.sleep(0.001)
    started = time.monotonic()
    events.close()
    assert time.monotonic() - started < 5
    assert len(good.heard) >= 200
    told = texts(tmp_path)
    assert told[0] == "the subscriber Blocking is too slow: it loses events"
    assert "in all" in told[1] and "does not answer" in told[2] and len(told) == 3
    assert len(read_events(tmp_path / "events.jsonl")[0]) == 203
    blocked.released.set()


def test_ticks_are_few_and_not_recorded(tmp_path: Path) -> None:
    one = Listener()
    events = EventStream(RunLog(tmp_path), [one])
    for step in range(10_000):
        events.tick(step, 1.0, 1.0)
    events.close()
    assert 1 <= len(one.heard) < 1000
    assert (tmp_path / "events.jsonl").read_text() == ""


def test_a_notice_may_come_from_a_signal_handler(tmp_path: Path) -> None:
    one = Listener()
    events = EventStream(RunLog(tmp_path), [one])
    before = signal.signal(signal.SIGALRM, lambda number, frame: events.notice("alarm"))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for step in range(2000):
            events.emit(EarlyStop(step))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    events.close()
    assert [event for event in one.heard if isinstance(event, EarlyStop)] == [EarlyStop(step) for step in range(2000)]
    assert len(one.heard) > 2000


def test_several_threads_emit(tmp_path: Path) -> None:
    one = Listener()
    events = EventStream(RunLog(tmp_path, max_bytes=2000, files=1000), [one])
    threads = [threading.Thread(target=lambda start=start: [events.emit(EarlyStop(start + step)) for step in range(200)]) for start in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events.close()
    records, problems = read_events(tmp_path / "events.jsonl")
    assert problems == [] and [record.event for record in records] == one.heard and len(one.heard) == 600


def test_a_full_disk_is_not_ignored(tmp_path: Path) -> None:
    events = EventStream(RunLog(tmp_path), [Listener()])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(DataError, match=r"events\.jsonl"):
            events.note("x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_terminal_shows_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = EventStream(RunLog(tmp_path), [Terminal(Reporter(), "student")])
    events.emit(Start("student", 2_000_000, 400, 0, 40, "cpu"))
    events.tick(5, 3.0, 100.0)
    scores = [{"metric": "bleu", "value": 12.345}]
    events.emit(Validation(10, "bleu", 12.345, 10.0, 14.0, 0.95, scores, [], 20, 0.1, None, best=True))
    events.emit(Step(10, 1e-3, 0.5, 100.0, 2.5, 2.5))
    events.emit(Rollback(20, 10, "the loss is nan", 1, 0.5))
    events.emit(Rollback(20, 10, "the loss is nan", 4, 0.5, final=True))
    events.emit(EarlyStop(20, "no better bleu in 3 validations"))
    events.note("a sentence")
    events.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "student: 2.00 M parameters on cpu, 400 pairs, 40 iterations",
        "student 10: validation bleu 12.35  (best so far)",
        lines[2],
        "student: iteration 20: the loss is nan; back to iteration 10, learning rate x 0.5, new data order (rollback 1)",
        "student: iteration 20: the loss is nan; back to iteration 10 for good: no rollback is left",
        "student: no better bleu in 3 validations, stopping early at iteration 20",
        "student: a sentence",
    ]
    assert lines[2].startswith("student 10/40  loss 2.5000  cross_entropy 2.5000  100 tok/s  best bleu 12.35")
    log = (tmp_path / "log.txt").read_text()
    assert "step 10  loss 2.5000  cross_entropy 2.5000  100 tok/s  lr 0.001  norm 0.5" in log and "validation at 10: bleu 12.35  (best so far)" in log
