"""Runs that an older cvmk wrote (commit 88273e5) go on: links for pointers, states and events without the fields that came later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import events, last_step, train

from cvmk.files import pointed
from cvmk.telemetry import read_events

PROGRESS = {"step", "tokens", "seconds", "rollbacks", "learning_rate_scale", "stale", "finished", "first_loss", "losses"}
RESULT = {
    *("step", "metric", "value", "low", "high", "confidence", "scores", "agreement", "sentences", "seconds"),
    *("sentences_per_second", "tokens", "tokens_per_second", "samples"),
}
SAMPLER = {"seed", "order", "epoch", "position", "max_tokens", "pairs"}
GUARD = {"max_rollbacks", "learning_rate_factor", "loss_factor", "gradient_factor", "window", "rollback_on_regression"}
EVENTS = {
    "start": {"title", "parameters", "pairs", "step"},
    "step": {"step", "learning_rate", "gradient_norm", "tokens_per_second", "loss", "cross_entropy", "logits", "hidden", "attention"},
    "validation": RESULT,
    "average": RESULT | {"iterations"},
    "rollback": {"step", "to", "problem", "rollbacks"},
    "early_stop": {"step"},
    "resumed": {"step"},
    "end": {"report"},
}


def only(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    assert names <= values.keys(), f"{names - values.keys()} went missing"
    return {name: values[name] for name in values if name in names}


def age(run: Path, **progress: Any) -> None:
    """Make a run of this cvmk one of then, with these values in its last state."""
    for state in run.glob("checkpoints/step-*/state.json"):
        values = json.loads(state.read_text())
        old = only(values, {"progress", "sampler", "guard", "validator"})
        old["progress"] = only(values["progress"], PROGRESS) | progress
        old["sampler"] = only(values["sampler"], SAMPLER)
        old["guard"] = {name: only(series, {"mean", "count", "exploding"}) for name, series in values["guard"].items()}
        best = values["validator"]["best"]
        old["validator"] = {
            "history": [only(result, RESULT) for result in values["validator"]["history"]],
            "best": best and {"result": only(best["result"], RESULT), "hypotheses": best["hypotheses"]},
        }
        state.write_text(json.dumps(old))
    for name in ("best", "last"):
        target = pointed(run / "checkpoints" / name)
        assert target is not None
        (run / "checkpoints" / name).unlink()
        (run / "checkpoints" / name).symlink_to(target)
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    old_lines = [only(line, {"time", "event"} | EVENTS[line["event"]]) for line in lines if line["event"] in EVENTS]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old_lines))
    resolved = json.loads((run / "config.resolved.json").read_text())
    resolved["guard"] = only(resolved["guard"], GUARD)
    (run / "config.resolved.json").write_text(json.dumps(resolved))


def test_a_run_of_then_goes_on_bit_for_bit(config: Path, tmp_path: Path) -> None:
    straight, old = tmp_path / "straight", tmp_path / "run"
    train(config, "training.iterations=60", f"run.folder={straight}")
    train(config)
    age(old)
    report = train(config, "training.iterations=60", resume=True)
    assert report["iterations"] == 60 and last_step(old) == 60
    for name in ("model.safetensors", "state.pt"):
        one, other = ((folder / "checkpoints" / "step-60" / name).read_bytes() for folder in (straight, old))
        assert one == other
    assert not (old / "checkpoints" / "best").is_symlink()
    records, problems = read_events(old / "events.jsonl")
    assert problems == [] and [record.event.KIND for record in records].count("start") == 2
    history = json.loads((old / "validation_history.json").read_text())
    assert [result["step"] for result in history] == [20, 40, 60]


@pytest.mark.parametrize(("rollbacks", "renewed"), [(0, False), (2, False), (3, True)])
def test_a_run_of_then_that_used_up_its_rollbacks_goes_on(config: Path, tmp_path: Path, rollbacks: int, renewed: bool) -> None:
    """It ended with exit code 4, and every resume of it did so again."""
    train(config)
    age(tmp_path / "run", rollbacks=rollbacks, learning_rate_scale=0.5**rollbacks)
    report = train(config, "training.iterations=60", resume=True)
    assert report["iterations"] == 60 and report["rollbacks"] == rollbacks
    (resumed,) = events(tmp_path / "run", "resumed")
    assert resumed["renewed"] is renewed
    progress = json.loads((tmp_path / "run" / "checkpoints" / "step-60" / "state.json").read_text())["progress"]
    assert progress["forgiven"] == (rollbacks if renewed else 0) and progress["learning_rate_scale"] == 0.5**rollbacks
