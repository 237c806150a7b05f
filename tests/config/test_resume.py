"""What a resumed run may have otherwise is written at the keys."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from pydantic import Field

from cvmk.config import DataConfig, TrainConfig
from cvmk.config.resume import changed_keys
from cvmk.config.section import MAY_CHANGE, OnResume, Section, walk

DATA = {"train": {"tsv": "a.tsv"}, "valid": {"tsv": "b.tsv"}}


def config(**tables: Any) -> dict[str, Any]:
    tables = {"data": DATA} | tables
    return json.loads(TrainConfig.model_validate_json(json.dumps(tables)).model_dump_json())  # type: ignore[no-any-return]


def changed(before: dict[str, Any], now: dict[str, Any], by_content: bool = False) -> list[str]:
    return changed_keys(TrainConfig, before, now, by_content=by_content)


def marked(mark: OnResume) -> set[str]:
    return {name for name, field, _ in walk(TrainConfig) if mark in field.metadata and not name.startswith("teacher.")}


def test_the_keys_that_may_change() -> None:
    assert marked(MAY_CHANGE) == {
        *("run.folder", "run.device", "run.threads", "run.report", "data.cache", "guard", "telemetry"),
        *(f"training.{key}" for key in ("iterations", "log_every", "save_every", "keep")),
        *(f"validation.{key}" for key in ("validate_every", "metrics", "bleu_tokenize", "patience", "min_delta", "bootstrap", "confidence")),
    }


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"training": {"iterations": 5, "log_every": 1}, "run": {"threads": 2, "folder": "x"}, "guard": {"window": 3}}, []),
        ({"model": {"ffn": 8}, "training": {"max_tokens": 99}, "run": {"seed": 3}}, ["model.ffn", "training.max_tokens", "run.seed"]),
        ({"teacher": {}}, ["teacher"]),
        ({"tokenizer": {"path": "x"}}, ["tokenizer.path"]),
        ({"data": DATA | {"folder": "x"}}, ["data.folder"]),
        ({"data": DATA | {"train": {"tsv": "c.tsv"}}}, ["data.train.tsv"]),
        ({"data": {"embedded": "phrasebook"}}, ["data.embedded", "data.source_language", "data.target_language", "data.train", "data.valid"]),
    ],
)
def test_other_keys_must_match(now: dict[str, Any], expected: list[str]) -> None:
    assert changed(config(), config(**now)) == expected
    assert {*expected} - {*changed(config(**now), config())} <= {"data.source_language", "data.target_language"}
    assert changed(config(**now), config(**now)) == []


def test_where_something_is_may_change_while_its_content_is_compared_elsewhere() -> None:
    moved = config(data={"folder": "x", "train": {"source": "s", "target": "t"}, "valid": {"jsonl": "j"}, "jsonl_source": "en"}, tokenizer={"path": "x"})
    assert len(changed(config(), moved)) == 8
    assert changed(config(), moved, by_content=True) == []
    assert changed(config(), config(data=DATA | {"on_bad_line": "skip"}), by_content=True) == ["data.on_bad_line"]


def test_a_teacher_that_is_trained_here_must_match_in_everything() -> None:
    before = config(teacher={"path": "a"})
    assert changed(before, config(teacher={"path": "b"})) == ["teacher.path"]
    assert changed(before, config(teacher={"path": "b"}), by_content=True) == []
    now = config(teacher={"path": "a", "training": {"iterations": 3}, "guard": {"window": 3}})
    assert changed(before, now, by_content=True) == ["teacher.training.iterations", "teacher.guard.window"]


def test_a_run_of_an_older_version() -> None:
    before = config()
    del before["model"]["norm"], before["guard"], before["data"]["jsonl_source"]
    before["model"]["removed_since"] = 7
    assert changed(before, config()) == []
    assert changed(before, config(model={"norm": "rmsnorm"})) == ["model.norm"]


def test_any_schema() -> None:
    class Inner(Section):
        a: int = Field(1)
        b: Annotated[int, MAY_CHANGE] = Field(2)

    class Outer(Section):
        inner: Inner | None = Field(None)
        data: DataConfig = Field()

    assert changed_keys(Outer, {"inner": {"a": 1, "b": 1}}, {"inner": {"a": 1, "b": 2}}, by_content=False) == []
    assert changed_keys(Outer, {"inner": None}, {"inner": {"a": 1, "b": 2}}, by_content=False) == ["inner"]


def test_a_run_from_before_optimisers_had_keys_of_their_own_goes_on() -> None:
    """Commit 0e9eea3 wrote these, whatever the schedule; the name may not change, nor what one takes."""
    for kind in ("inverse_sqrt", "cosine", "constant"):
        now = config(schedule={"kind": kind})
        before = {
            **now,
            "optimizer": {"name": "adamw", "learning_rate": 0.001, "betas": [0.9, 0.98], "eps": 1e-9, "weight_decay": 0.01},
            "schedule": {"kind": kind, "warmup": 1000, "final_factor": 0.05},
        }
        assert changed(before, now) == []
    assert changed(before, config(optimizer={"name": "sam"}, schedule={"kind": "constant"})) == ["optimizer.name", "optimizer.base", "optimizer.rho"]
