"""Folders of runs without training: what `cvmk train` leaves behind, with the numbers that a test needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvmk.config.schema import DataConfig, TrainConfig
from cvmk.report.evaluations import write_evaluation
from cvmk.telemetry.schema import End, Event, Record, SearchEnded, SearchStarted, Start, Step, TrialEnded, TrialScored, TrialStarted, Validation

REFERENCES = (
    "the red house stands by the sea", "two dogs run over the wide meadow", "we would like a table for four people",
    "the train leaves from platform nine", "my sister has bought a new bicycle", "a woman in a blue coat waits for the bus",
    "the children play football in the rain", "he reads the paper every morning",
)  # fmt: skip
SOURCES = tuple(f"source {number}" for number in range(len(REFERENCES)))


def sentences(count: int) -> tuple[list[str], list[str]]:
    """Sources and references, all different."""
    return [f"source {at}" for at in range(count)], [f"{REFERENCES[at % len(REFERENCES)]} number {at}" for at in range(count)]


def worse(texts: Sequence[str], every: int) -> list[str]:
    """Every so-many-th text loses its last words."""
    return [" ".join(text.split()[:-3]) if at % every == 0 else text for at, text in enumerate(texts)]


def score(metric: str, value: float) -> dict[str, Any]:
    return {"metric": metric, "value": value, "signature": "recorded", "fallback": False}


def validation(step: int, value: float, **changes: Any) -> Validation:
    values: dict[str, Any] = {
        "step": step, "metric": "bleu", "value": value, "low": value - 1, "high": value + 1, "confidence": 0.95, "scores": [score("bleu", value)],
        "agreement": [], "sentences": 40, "seconds": 1.0, "tokens": 400, "best": True,
    }  # fmt: skip
    return Validation(**values | changes)


def step(number: int, loss: float = 2.0, norm: float = 0.5, rate: float = 1e-3) -> Step:
    return Step(number, rate, norm, 1000.0, loss, loss)


def write_run(
    folder: Path,
    events: Sequence[Event] = (),
    *,
    config: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    hypotheses: Sequence[str] | None = None,
    teacher: Sequence[str] | None = None,
    references: Sequence[str] | None = None,
) -> Path:
    """A run's folder. With `hypotheses` it is finished and was scored on as many sentences, on the validation and the test set."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved = json.loads(TrainConfig(data=DataConfig(embedded="phrasebook")).model_dump_json())
    for key, value in (config or {}).items():
        section, _, name = key.partition(".")
        resolved[section][name] = value
    (folder / "config.resolved.json").write_text(json.dumps(resolved))
    told: list[Event] = [Start("model", 1000, 100, 0, 100, "cpu"), *events]
    if hypotheses is not None:
        sources, own = sentences(len(hypotheses))
        for name in ("validation", "test"):
            write_evaluation(folder / "evaluations" / f"{name}.jsonl", sources, references or own, hypotheses, teacher)
        result = {**validation(100, 50.0).values(), "sentences": len(hypotheses), "sentences_per_second": 40.0, "tokens_per_second": 400.0}
        report = {"iterations": 100, "weights": "checkpoint at iteration 100", "parameters": 1000, "validation": result, "test": result} | dict(report or {})
        told.append(End(report))
    if report is not None:
        (folder / "training_report.json").write_text(json.dumps(report))
    lines = [json.dumps(Record(1.8e9 + at, event).to_json()) + "\n" for at, event in enumerate(told)]
    (folder / "events.jsonl").write_text("".join(lines))
    return folder


SPACE: dict[str, Any] = {
    "optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "model.dropout": {"low": 0.0, "high": 0.3, "step": 0.1},
    "model.norm": {"choices": ["layernorm", "rmsnorm"]},
}  # fmt: skip


def write_search(folder: Path, trials: Sequence[tuple[str, float | None]], *, ended: bool = True, rate: float = 1e-3, more: int = 0) -> Path:
    """A search's folder, whose trials have these states and scores; all are runs of 40 sentences, the complete ones finished.

    rate   of the last one.
    more   keys with long names that are searched, too.
    """
    others = {f"distillation.a_rather_long_name_of_a_key_{at}": {"low": 0.0, "high": 1.0} for at in range(more)}
    events: list[Event] = [SearchStarted("study", "bleu", "maximize", "tpe", "median", {**SPACE, **others}, {"trials": len(trials)})]
    for number, (state, value) in enumerate(trials):
        own = folder / "trials" / f"{number:04d}"
        parameters = {"optimizer.learning_rate": rate if number == len(trials) - 1 else 1e-3 + 1e-4 * number, "model.dropout": 0.0, "model.norm": "rmsnorm"}
        hypotheses = worse(sentences(40)[1], 2 + number) if state == "complete" else None
        write_run(own, [step(1), validation(10, value or 0.0)], hypotheses=hypotheses, config=parameters)
        events.append(TrialStarted(number, parameters | dict.fromkeys(others, 0.123456), str(own)))
        events += [TrialScored(number, 10, "bleu", value, True)] if value is not None else []
        events += [TrialEnded(number, state, value, 10, 1.5, "it diverged" if state == "failed" else "")] if state != "running" else []
    events += [SearchEnded(None, None, reason="the budget of trials is used up")] if ended else []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(Record(1.8e9 + at, event).to_json()) + "\n" for at, event in enumerate(events)))
    return folder
