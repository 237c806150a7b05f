"""What a run's events say of it: numbers, stretches that were done again, marks, samples, and lines that cannot be read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import event_logs
from event_logs import EPOCH, start, steps, validation, write

from cvmk.dashboard.run import Run
from cvmk.telemetry.schema import (
    Anomaly,
    End,
    Interruption,
    Iterations,
    Note,
    Resources,
    Resumed,
    Rollback,
    SearchEnded,
    SearchStarted,
    Serving,
    ServingEnded,
    ServingStarted,
    Step,
    TrialEnded,
)


def read(folder: Path, run: Run | None = None) -> Run:
    run = run or Run(folder, folder.name)
    while run.advance():
        pass
    return run


def test_numbers_scores_and_samples(tmp_path: Path) -> None:
    samples = [{"source": "A man.", "reference": "Ein Mann.", "hypothesis": "Ein Mann!"}]
    run = read(write(tmp_path, start(), *steps(range(10, 60, 10)), validation(50, 31.0, samples=samples, best=True)))
    shown, marks = run.view("step", None, None, 100)
    assert shown["iteration"].x.tolist() == [10, 20, 30, 40, 50] and shown["iteration"].mean[:, shown["iteration"].fields.index("loss")].tolist() == [
        10,
        5,
        100 / 30,
        2.5,
        2,
    ]
    assert shown["validation"].fields == ["validation/bleu", "validation/chrf"] and shown["validation"].mean.tolist() == [[31.0, 51.0]]
    told = run.summary()
    assert (told["state"], told["step"], told["iterations"], told["best"]) == ("running", 50, 1000, {"metric": "BLEU", "value": 31.0, "step": 50})
    assert told["extent"] == {"step": [10, 50], "time": [1, 6]} and told["last"]["loss"] == 2.0 and told["progress"] == 1.0
    assert run.samples() == {"step": 50, "samples": samples} and marks == [] and told["problems"] == []


def test_a_run_that_is_resumed_goes_on(tmp_path: Path) -> None:
    """What was lost with its checkpoint is faint, and the pause is no time of training."""
    run = read(write(tmp_path, start(), *steps(range(1, 31)), Interruption(30)))
    assert run.summary()["state"] == "interrupted"
    write(tmp_path, start(20), Resumed(20), *steps(range(21, 41)), End({}), begin=EPOCH + 86_400)
    read(tmp_path, run)
    shown, marks = run.view("step", None, None, 1000)
    lines = shown["iteration"]
    assert lines.x.tolist() == [*range(1, 31), *range(21, 41)] and lines.faint.tolist() == [False] * 20 + [True] * 10 + [False] * 20
    assert run.view("time", None, None, 1000)[0]["iteration"].x.tolist() == [*range(1, 31), *range(33, 53)]
    assert [(mark["kind"], mark["x"]) for mark in marks] == [("interrupted", 30), ("start", 20), ("end", 40)]
    assert run.summary()["state"] == "finished"


def test_a_rollback_is_marked_where_it_happened(tmp_path: Path) -> None:
    run = read(write(tmp_path, start(), *steps(range(1, 11)), Rollback(10, 5, "the loss is too large", 1, 0.5), *steps(range(6, 9))))
    shown, (mark,) = run.view("step", None, None, 100)
    assert shown["iteration"].faint.tolist() == [False] * 5 + [True] * 5 + [False] * 3
    assert mark["x"] == 10 and mark["trouble"] and "back to iteration 5" in mark["text"]
    assert run.view("step", 0, 9, 100)[1] == []


def test_lines_that_cannot_be_read_are_told_and_the_rest_counts(tmp_path: Path) -> None:
    newer = {"time": 1.0, "event": "step", "version": 99, "step": 3, "loss": 1.0}
    other = {"time": 1.0, "event": "weather", "rain": True}
    null = {"time": EPOCH + 9, "event": "step", "step": 5, "loss": None, "learning_rate": 1, "gradient_norm": 1.0, "tokens_per_second": 1e400}
    wrong = {"time": EPOCH, "event": "step", "step": 5, "loss": "much", "learning_rate": 1, "gradient_norm": 1.0, "tokens_per_second": 1}
    scores = {"time": EPOCH, **validation(9, 3.0).values(), "event": "validation", "scores": ["none"]}
    write(tmp_path, start(), *steps((1, 2)))
    with open(tmp_path / "events.jsonl", "ab") as file:
        for line in (
            b'{"time": 1, "event": "ste',
            b"\xff\xfe",
            b"[]",
            b'{"event": 3}',
            b"[" * 100_000,
            *(json.dumps(one).encode() for one in (newer, other, other, wrong, scores, null)),
        ):
            file.write(line + b"\n")
    run = read(write(tmp_path, *steps((6,)), begin=EPOCH + 10))
    shown, _ = run.view("step", None, None, 100)
    assert shown["iteration"].x.tolist() == [1, 2, 5, 6]
    problems = run.summary()["problems"]
    assert problems[:3] == [
        "events.jsonl: 1 event 'step' of version 99 is passed over, this cvmk reads up to version 1",
        "events.jsonl: 2 events 'weather' of version 1 are passed over, this cvmk does not know that kind",
        "events.jsonl line 4 is left out: it is no JSON, as where a run was killed",
    ]
    assert len(problems) == 7 and problems[-1] == "and 2 more"  # nesting without end, and a loss that is no number
    json.dumps(run.summary(), allow_nan=False)


def test_a_log_that_is_cut_is_shown_as_it_is_now(tmp_path: Path) -> None:
    run = read(write(tmp_path, start(), *steps(range(1, 101))))
    log = tmp_path / "events.jsonl"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    write(read(tmp_path, run).folder, Note("on it goes"), *steps((77,)), begin=EPOCH + 500)
    read(tmp_path, run)
    found = run.view("step", None, None, 1000)[0]["iteration"].x.tolist()
    assert found[:40] == list(range(1, 41)) and found[-1] == 77 and len(found) < 60


def test_much_is_read_quickly_and_kept_small(tmp_path: Path) -> None:
    """10,000 events here; a million is the same, a hundred times."""
    (tmp_path / "events.jsonl").write_bytes(event_logs.lines(start(), *steps(range(1, 10_001))))
    begin = time.process_time()
    run = read(tmp_path)
    read_in = time.process_time() - begin
    begin = time.process_time()
    shown, _ = run.view("step", None, None, 400)
    assert time.process_time() - begin < 0.5 and read_in < 10
    assert len(shown["iteration"].x) <= 402 and shown["iteration"].greatest[0].max() >= 9000


def test_iterations_and_what_the_machine_does(tmp_path: Path) -> None:
    """Each iteration at its own time; what `Step` says again of it is no second point; an anomaly stands in its chart."""
    values = Iterations(1, [4.0, 3.0, 9.0], [1e-3] * 3, [0.5] * 3, [100, 100, 100], [0.5, 0.5, 1.0], [0.1, 0.0, 0.6])
    machine = Resources(3, 1.5, 0.75, 2_000_000_000, None, None, [{"index": 0, "use": 0.5, "memory": 10**9}])
    write(tmp_path, start(), values, Step(3, 1e-3, 0.5, 150.0, 9.0, cross_entropy=8.0), Anomaly(3, "throughput", 90.0, 200.0), machine)
    run = read(tmp_path)
    shown, (mark,) = run.view("time", None, None, 100)
    lines = shown["iteration"]
    assert lines.x.tolist() == [-0.5, 0.0, 1.0]
    assert dict(zip(lines.fields, lines.mean[2], strict=True)) == {
        "loss": 9.0, "learning_rate": 1e-3, "gradient_norm": 0.5, "tokens_per_second": 100.0, "seconds": 1.0, "data_wait": 0.6,
    }  # fmt: skip
    assert dict(zip(shown["machine"].fields, shown["machine"].mean[0], strict=True)) == {
        "process/cpu": 1.5, "machine/cpu": 75.0, "process/memory": 2.0, "gpu0/use": 50.0, "gpu0/memory": 1.0,
    }  # fmt: skip
    assert shown["loss"].mean[0].tolist() == [8.0]
    assert mark["chart"] == "tokens_per_second" and mark["value"] == 90.0 and mark["trouble"]
    assert [one.title for one in run.charts.values() if one.table == "machine"][-1] == "Memory of GPU 0"


def serving(translations: int, seconds: float | None, **changes: Any) -> Serving:
    models = {"a/b": {"translations": translations, "queue_seconds": seconds}}
    values: dict[str, Any] = {"requests": {"OK": 60, "CANCELLED": 3, "INTERNAL": 6}, "rejections": {"rate": 12}, "models": models}
    return Serving(60.0, 5, **{**values, **changes})


def test_a_service_has_charts_over_time(tmp_path: Path) -> None:
    """It has no iterations; when it was down is no time."""
    cores = Resources(None, 0.5, 0.1, 1, 1, 2)
    write(tmp_path, ServingStarted({"a/b": {}}), serving(30, 0.25), cores, ServingEnded())
    broken = serving(1, 1.0, models={"a/b": 7}, requests={"OK": "many"})
    run = read(write(tmp_path, ServingStarted({}), serving(90, None), cores, broken, begin=EPOCH + 10_000))
    assert run.summary()["extent"]["step"] is None and run.view("step", None, None, 100)[0] == {} and run.summary()["state"] == "running"
    shown, marks = run.view("time", None, None, 100)
    service, machine = shown["service"], shown["machine"]
    assert service.x.tolist() == [1, 4, 6] and machine.x.tolist() == [2, 5] and len(set(service.segment.tolist())) == 2 and not service.faint.any()
    found = {name: [None if value != value else value for value in service.mean[:, place].tolist()] for place, name in enumerate(service.fields)}
    assert found == {
        "service/requests": [1.15, 1.15, 0.0], "service/failures": [0.1, 0.1, 0.0], "service/rejections": [0.2] * 3, "service/sessions": [5.0] * 3,
        "service/translations/a/b": [0.5, 1.5, None], "service/queue_seconds/a/b": [250.0, None, None],
    }  # fmt: skip
    assert [run.charts[name].title for name in found if name.endswith("a/b")] == ["Wait in the queue: a/b", "Translations: a/b"]
    assert [mark["kind"] for mark in marks] == ["serving_start", "serving_end", "serving_start"]
    assert read(write(tmp_path, ServingEnded(), begin=EPOCH + 20_000), run).summary()["state"] == "finished"


def test_a_search_tells_its_best_score(tmp_path: Path) -> None:
    begun = SearchStarted("s", "chrf", "maximize", "tpe", None, {})
    run = read(write(tmp_path, begun, TrialEnded(0, "complete", 20.0, 9, best=True), TrialEnded(1, "pruned", 30.0, 3), SearchEnded(0, 20.0)))
    assert (run.summary()["best"], run.summary()["state"]) == ({"metric": "chrF", "value": 20.0, "step": 9}, "finished")
    assert read(write(tmp_path, begun), run).summary()["state"] == "running"
