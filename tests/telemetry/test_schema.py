"""Events of every age: written by this cvmk, by the one before there were versions, by a later one, and damaged."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from cvmk.errors import DataError
from cvmk.telemetry import EventReader, read_events
from cvmk.telemetry.schema import EVENTS, Event, Iterations, Record, Start, Step, Validation

OLD = """\
{"time": 1795894880.33, "event": "start", "title": "model", "parameters": 34304, "pairs": 400, "step": 0}
{"time": 1795894880.395, "event": "step", "step": 10, "learning_rate": 0.003, "gradient_norm": 0.72, "tokens_per_second": 73176.2, "loss": 5.86, \
"cross_entropy": 5.86, "logits": 0.0, "hidden": 0.0, "attention": 0.0}
{"time": 1795894880.5, "event": "validation", "step": 20, "metric": "bleu", "value": 0.0, "low": 0.0, "high": 0.0, "confidence": 0.95, \
"scores": [{"metric": "bleu", "value": 0.0, "signature": "nrefs:1", "fallback": false}], "agreement": [], "sentences": 20, "seconds": 0.03, \
"sentences_per_second": 688.8, "tokens": 1530, "tokens_per_second": 52694.2, "samples": [{"source": "a", "hypothesis": "b", "reference": "c"}]}
{"time": 1795894880.6, "event": "rollback", "step": 26, "to": 20, "problem": "the loss is nan", "rollbacks": 1}
{"time": 1795894880.7, "event": "early_stop", "step": 40}
{"time": 1795894880.7, "event": "interrupted", "step": 40}
{"time": 1795894880.7, "event": "resumed", "step": 40}
{"time": 1795894880.7, "event": "teacher", "path": "runs/t", "weights": "/x/model", "fingerprint": "80", "finished": true}
{"time": 1795894880.7, "event": "end", "report": {"title": "model"}}
"""
"""As cvmk wrote them before they had versions."""


def examples() -> list[Event]:
    values: dict[str, Any] = {"int": 3, "str": "é", "float": 0.5, "bool": True, "int | None": 4, "float | None": None, "str | None": "cpu"}
    values |= {"list[float]": [0.5, 1.5], "list[int]": [1, 2]}
    empty: dict[bool, Any] = {True: [], False: {}}
    made = []
    for kind in EVENTS:
        types = {one.name: str(one.type) for one in dataclasses.fields(kind)}
        made.append(kind(**{name: values.get(of, empty[of.startswith("list")]) for name, of in types.items()}))
    return made


@pytest.mark.parametrize("event", examples(), ids=lambda event: event.KIND)
def test_every_event_comes_back_as_it_went(event: Event) -> None:
    record = Record.now(event)
    line = json.dumps(record.to_json())
    assert Record.from_json(json.loads(line)) == record
    assert json.loads(line)["version"] == event.VERSION
    event.text()


def test_names_are_given_once() -> None:
    assert len({event.KIND for event in EVENTS}) == len(EVENTS)
    for event in EVENTS:
        assert not {"time", "event", "version"} & {one.name for one in dataclasses.fields(event)}


def test_events_of_before_are_read(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(OLD)
    records, problems = read_events(tmp_path / "events.jsonl")
    assert problems == [] and len(records) == OLD.count("\n")
    start, step, validation = (record.event for record in records[:3])
    assert isinstance(start, Start) and start.iterations is None and start.text() == "0.03 M parameters, 400 pairs"
    assert isinstance(step, Step) and step.loss == 5.86 and records[1].time == 1795894880.395
    assert isinstance(validation, Validation) and validation.samples[0]["hypothesis"] == "b"


def test_events_of_later_are_told_and_passed_over(tmp_path: Path) -> None:
    lines = [*OLD.splitlines()[:2], '{"time": 1, "event": "step", "version": 2, "step": 1}', *['{"time": 1, "event": "comet", "version": 1}'] * 3]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + '\n{"time": 1, "event": "early_stop", "version": 1, "step": 4, "mood": "good"}\n')
    records, problems = read_events(tmp_path / "events.jsonl")
    assert [record.event.KIND for record in records] == ["start", "step", "early_stop"]  # a field that is not known is no reason to lose the event
    assert len(problems) == 2
    assert "1 event 'step' of version 2 is passed over, this cvmk reads up to version 1" in problems[0]
    assert "3 events 'comet' of version 1 are passed over, this cvmk does not know that kind" in problems[1]


def test_a_value_of_another_type_costs_its_line_only(tmp_path: Path) -> None:
    good = '{"time": 1, "event": "early_stop", "step": 4}'
    bad = [
        '{"time": 1, "event": "early_stop", "step": "4"}',
        '{"time": 1, "event": "early_stop", "step": true}',
        '{"time": 1, "event": "early_stop", "step": null}',
        '{"time": 1, "event": "tick", "step": 1}',
        '{"time": 1, "event": "iterations", "step": 1, "loss": [1, "x"], "learning_rate": [], "gradient_norm": [], "tokens": [], "seconds": []}',
        '{"time": 1, "event": "end", "report": []}',
    ]
    (tmp_path / "events.jsonl").write_text("\n".join([good, *bad, good]) + "\n")
    records, problems = read_events(tmp_path / "events.jsonl")
    assert [record.event.KIND for record in records] == ["early_stop"] * 2
    assert len(problems) == len(bad)
    assert "'step' is not a whole number" in problems[1] and "'loss' is not a number" in problems[4] and "'report' is not an object" in problems[5]


@pytest.mark.parametrize("cut", [1, 30, 107, 150])
def test_a_file_that_is_cut_is_read_as_far_as_it_is_whole(tmp_path: Path, cut: int) -> None:
    whole = OLD.encode()[:-cut]
    (tmp_path / "events.jsonl").write_bytes(whole)
    records, problems = read_events(tmp_path / "events.jsonl")
    assert len(records) == whole.count(b"\n")
    assert len(problems) == 1 and f"line {len(records) + 1} is cut off" in problems[0]


def test_damage_in_the_middle_costs_its_line_only(tmp_path: Path) -> None:
    lines = OLD.splitlines()
    broken = ["[1, 2]", "null", '{"event": 3}', '{"event": "step", "step": 1}', '{"event": "early_stop", "time": "x", "step": 1}', "\x00\x00"]
    (tmp_path / "events.jsonl").write_text("\n".join([lines[0], lines[1][:40], "", *broken, lines[3]]) + "\n")
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n" + lines[4].encode() + b"\n")
    records, problems = read_events(tmp_path / "events.jsonl")
    assert [record.event.KIND for record in records] == ["start", "rollback", "early_stop"]
    assert [int(problem.split("line ")[1].split()[0]) for problem in problems] == [2, 4, 5, 6, 7, 8, 9, 11]
    assert "event 'step' lacks 'learning_rate'" in problems[4]


def test_many_broken_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("x\n" * 1000)
    _, problems = read_events(tmp_path / "events.jsonl")
    assert len(problems) == 21 and "980 more lines" in problems[-1]


def test_a_growing_file_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(OLD[:150])
    reader = EventReader(path)
    assert [record.event.KIND for record in reader.read()] == ["start"]
    assert "line 2 is cut off" in reader.problems()[0]
    with open(path, "a") as file:
        file.write(OLD[150:])
    assert len(reader.read()) == OLD.count("\n") - 1 and reader.problems() == [] and reader.read() == []


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"events\.jsonl"):
        read_events(tmp_path / "events.jsonl")


def test_numbers_that_are_none_are_strict_json() -> None:
    event = Step(step=1, learning_rate=1.0, gradient_norm=math.inf, tokens_per_second=1.0, loss=math.nan)
    line = Record.now(event).to_json()
    json.dumps(line, allow_nan=False)
    back = Record.from_json(line).event
    assert isinstance(back, Step) and math.isnan(back.loss) and math.isnan(back.gradient_norm)


def test_lists_of_numbers_come_back_with_what_is_no_number() -> None:
    event = Iterations(1, [2.0, math.nan], [1.0, 1.0], [math.inf, 1.0], [3, 4], [0.1, 0.1], [0.0, 0.0])
    back = Record.from_json(json.loads(json.dumps(Record.now(event).to_json(), allow_nan=False))).event
    assert isinstance(back, Iterations) and back.loss[0] == 2.0 and math.isnan(back.loss[1]) and math.isnan(back.gradient_norm[0]) and back.tokens == [3, 4]
