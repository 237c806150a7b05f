"""Every iteration is written once, in lines of many; anomalies are flagged and summed up by epoch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cvmk.telemetry import AnomalyWatch, Curves, EventStream, Iteration, Recorder, RunLog, read_events, recorder
from cvmk.telemetry.schema import Anomaly, Epoch, Event, Iterations


def run(folder: Path, rows: list[Iteration], **options: bool) -> list[Event]:
    events = EventStream(RunLog(folder))
    one = Recorder(events, watch=AnomalyWatch(), **options)
    for row in rows:
        one.iteration(row)
    assert one.step == rows[-1].step
    one.finish()
    events.close()
    records, problems = read_events(folder / "events.jsonl")
    assert problems == []
    return [record.event for record in records]


def rows(count: int, per_epoch: int = 100, first: int = 0, *, losses: dict[int, float] | None = None) -> list[Iteration]:
    return [
        Iteration(number + 1, number // per_epoch, number % per_epoch == 0, number % per_epoch == per_epoch - 1, (losses or {}).get(number + 1, 3.0), 1e-3,
                  0.123456789, 500, 0.1, 0.001)
        for number in range(first, count)
    ]  # fmt: skip


def test_every_iteration_is_there_once(tmp_path: Path) -> None:
    events = run(tmp_path, rows(1050, 1000))
    chunks = [event for event in events if isinstance(event, Iterations)]
    assert [step for event in chunks for step in range(event.step, event.step + len(event.loss))] == list(range(1, 1051))
    assert chunks[0].gradient_norm[0] == 0.123457 and chunks[0].tokens[0] == 500
    assert len(events) < 20


def test_epochs(tmp_path: Path) -> None:
    epochs = [event for event in run(tmp_path, rows(250, first=40)) if isinstance(event, Epoch)]
    assert [(epoch.epoch, epoch.step, epoch.iterations, epoch.whole) for epoch in epochs] == [(1, 100, 60, False), (2, 200, 100, True), (3, 250, 50, False)]
    assert epochs[1].tokens == 50_000 and epochs[1].seconds == 10.0 and epochs[1].data_wait == 0.1 and epochs[1].loss == pytest.approx(3.0)
    assert "epoch 3 (in part): loss 3.0000, 50 iterations, 5.0 s; anomalies: none" == epochs[2].text()


def test_anomalies_are_flagged_and_summed_up(tmp_path: Path) -> None:
    events = run(tmp_path, rows(200, losses={80: 9.0, 150: 8.0, 151: math.nan}))
    assert [event.step for event in events if isinstance(event, Anomaly)] == [80, 150, 151]
    assert [event.anomalies for event in events if isinstance(event, Epoch)] == [{"loss": 1}, {"loss": 2}]
    series = Curves(read_events(tmp_path / "events.jsonl")[0]).series
    assert series["epoch/anomalies"].values == [1, 2] and math.isnan(series["loss"].values[150])
    log = (tmp_path / "log.txt").read_text()
    assert "anomaly at 80: loss 9, usually 3" in log and "anomalies: 2 of loss" in log


def test_a_flood_of_anomalies_is_counted(tmp_path: Path) -> None:
    events = run(tmp_path, rows(400, 400, losses=dict.fromkeys(range(200, 350), math.nan)))
    assert sum(isinstance(event, Anomaly) for event in events) == 100
    assert [event.anomalies for event in events if isinstance(event, Epoch)] == [{"loss": 150}]


def test_only_what_is_asked_for(tmp_path: Path) -> None:
    assert {type(event) for event in run(tmp_path, rows(200), iterations=False)} == {Epoch}


def test_after_a_rollback_the_past_is_another(tmp_path: Path) -> None:
    events = EventStream(RunLog(tmp_path))
    one = Recorder(events, watch=AnomalyWatch())
    for row in [*rows(60), *rows(61, first=60, losses={61: math.nan})]:
        one.iteration(row)
    one.finish()
    for row in rows(100, first=50, losses={55: 9.0}):  # too early to be judged again
        one.iteration(row)
    one.finish()
    events.close()
    found = [record.event for record in read_events(tmp_path / "events.jsonl")[0]]
    assert [event.step for event in found if isinstance(event, Anomaly)] == [61]
    assert [(event.step, event.whole) for event in found if isinstance(event, Epoch)] == [(61, False), (100, False)]


def test_a_slow_training_is_told_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_SECONDS", 0.0)
    assert sum(isinstance(event, Iterations) for event in run(tmp_path, rows(20))) == 20
