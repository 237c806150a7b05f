"""`cvmk train` from configuration to report: teacher and student, divergence and recovery, and what it says of bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import command, events, last_step, train

from cvmk import nvtx
from cvmk.config.loading import load_train_config
from cvmk.errors import ConfigError, DataError, DivergedError
from cvmk.telemetry import Record, Reporter
from cvmk.training import pipeline
from cvmk.training.checkpoint import CheckpointStore
from cvmk.training.signals import Interrupted, StopSignal
from cvmk.training.teacher import load_teacher
from cvmk.training.trainer import Trainer
from cvmk.validation import DistillationValidator, ValidationResult

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_teacher_and_student(with_teacher: Path, tmp_path: Path, cvmk: Run) -> None:
    done = cvmk("train", with_teacher, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    run = tmp_path / "run"
    assert report == json.loads((run / "training_report.json").read_text())
    assert set(report["losses"]["last"]) == {"loss", "cross_entropy", "logits", "hidden", "attention"}
    assert report["losses"]["last"]["loss"] < report["losses"]["first"]
    assert report["throughput"]["target_tokens_per_second"] > 0
    for part in ("validation", "test"):
        assert {score["metric"] for score in report[part]["scores"]} == {"bleu", "chrf", "ter"}
        assert {score["metric"] for score in report[part]["agreement"]} == {"bleu", "chrf", "ter"}  # against the teacher's own output
    assert report["teacher"]["validation"][0]["signature"].startswith("nrefs:1")
    for name in ("config.toml", "config.resolved.json", "environment.json", "events.jsonl", "log.txt", "validation_history.json", "hypotheses/step-20.txt"):
        assert (run / name).is_file(), name
    for name in ("config.json", "model.safetensors", "card.md"):
        assert (run / "model" / name).is_file(), name
    assert [result["step"] for result in json.loads((run / "validation_history.json").read_text())][:2] == [20, 40]
    translated = cvmk("translate", run, input="It is nine o'clock.\n\n")
    assert translated.returncode == 0 and translated.stdout.count("\n") == 2


def test_a_trained_teacher_is_reused(with_teacher: Path, tmp_path: Path) -> None:
    train(with_teacher)
    text = with_teacher.read_text().split("[teacher.model]")[0]
    other = tmp_path / "other.toml"
    other.write_text(f'{text}\n[teacher]\npath = "{tmp_path}/run/teacher"\n')
    report = train(other, f"run.folder={tmp_path}/second")
    assert report["teacher"]["path"] == f"{tmp_path}/run/teacher"
    assert not (tmp_path / "second" / "teacher").exists() and not (tmp_path / "second" / "tokenizer").exists()


def test_a_teacher_that_is_not_finished_is_told(with_teacher: Path, tmp_path: Path) -> None:
    train(with_teacher)
    text = with_teacher.read_text().split("[teacher.model]")[0]
    (tmp_path / "other.toml").write_text(f'{text}\n[teacher]\npath = "{tmp_path}/run/teacher"\n')
    shutil.move(tmp_path / "run" / "teacher" / "model", tmp_path / "model")  # as a run is that was stopped before its end
    train(tmp_path / "other.toml", f"run.folder={tmp_path}/second", "training.iterations=2")
    (told,) = events(tmp_path / "second", "teacher")
    assert not told["finished"] and told["weights"] == str((tmp_path / "run" / "teacher" / "checkpoints" / "step-20").resolve())
    assert f"the teacher's run {tmp_path}/run/teacher is not finished: its best checkpoint (step-20) teaches" in (tmp_path / "second" / "log.txt").read_text()
    (told,) = events(tmp_path / "run", "teacher")
    assert told["finished"] and "not finished" not in (tmp_path / "run" / "log.txt").read_text()


def test_another_vocabulary_is_an_error_that_names_both(with_teacher: Path, tmp_path: Path) -> None:
    train(with_teacher)
    text = with_teacher.read_text().split("[teacher.model]")[0]
    alone = tmp_path / "alone.toml"
    alone.write_text(text)
    train(alone, f"run.folder={tmp_path}/alone", "tokenizer.vocabulary=360", "training.iterations=1")
    other = tmp_path / "other.toml"
    other.write_text(f'{text}\n[teacher]\npath = "{tmp_path}/run/teacher"\n')
    with pytest.raises(ConfigError) as caught:
        train(other, f"run.folder={tmp_path}/second", f"tokenizer.path={tmp_path}/alone/tokenizer")
    assert "360" in str(caught.value) and "400" in str(caught.value)


def test_sequence_level_outputs_are_written_once(with_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = f"data.cache={tmp_path}/cache"
    options = ["distillation.sequence_level.enabled=true", "distillation.sequence_level.beam_size=2", "training.iterations=5", cache]
    report = train(with_teacher, *options)
    assert 400 < report["pairs"]["trained_on"] <= 800
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("teacher-*.jsonl")}
    assert any("train" in path.name for path in files)
    again = train(with_teacher, *options, f"run.folder={tmp_path}/again")
    assert again["pairs"] == report["pairs"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("teacher-*.jsonl")} == files
    replaced = train(with_teacher, *options, 'distillation.sequence_level.mix="replace"', f"run.folder={tmp_path}/replaced")
    assert replaced["pairs"]["trained_on"] == report["pairs"]["trained_on"] - 400


# -- divergence --------------------------------------------------------------------------------------------------------------
def poison(trainer: Trainer) -> None:
    with torch.no_grad():
        next(iter(trainer.model.parameters())).fill_(float("nan"))


def test_divergence_rolls_back_and_recovers(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    struck: list[int] = []

    def strike(trainer: Trainer) -> None:
        if trainer.progress.step == 25 and not struck:
            struck.append(25)
            poison(trainer)

    report = train(config, on_step=strike, monkeypatch=monkeypatch)
    (rollback,) = events(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["to"]) == (26, 20) and "loss is nan" in rollback["problem"]
    assert report["rollbacks"] == 1 and report["iterations"] == 40
    rates = {event["step"]: event["learning_rate"] for event in events(tmp_path / "run", "step")}
    assert rates[30] == pytest.approx(0.5 * 3e-3 * (10 / 30) ** 0.5)  # half the rate that it would have been
    assert report["losses"]["last"]["loss"] < report["losses"]["first"]


def test_divergence_before_the_first_validation(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    struck: list[int] = []

    def strike(trainer: Trainer) -> None:
        if trainer.progress.step == 5 and not struck:
            struck.append(5)
            poison(trainer)

    assert train(config, on_step=strike, monkeypatch=monkeypatch)["iterations"] == 40
    assert events(tmp_path / "run", "rollback")[0]["to"] == 0


def test_weights_lost_just_before_a_validation_are_not_the_best(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of iteration 20 is finite, its update is not, and iteration 20 is the first validation."""
    struck: list[int] = []

    def strike(trainer: Trainer) -> None:
        if trainer.progress.step == 20 and not struck:
            struck.append(20)
            poison(trainer)

    report = train(config, on_step=strike, monkeypatch=monkeypatch)
    (rollback,) = events(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["to"]) == (20, 0) and "weight" in rollback["problem"]
    assert report["iterations"] == 40


def test_divergence_again_and_again_stops_the_run(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def strike(trainer: Trainer) -> None:
        if trainer.progress.step >= 25:
            poison(trainer)

    with monkeypatch.context() as patch, pytest.raises(DivergedError, match="after 2 rollbacks.*checkpoint at iteration 20") as caught:
        train(config, "guard.max_rollbacks=2", on_step=strike, monkeypatch=patch)
    run = tmp_path / "run"
    assert [event["final"] for event in events(run, "rollback")] == [False, False, True]
    checkpoint = CheckpointStore(run / "checkpoints", keep=2).load(20)
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.weights.values())
    report = json.loads((run / "training_report.json").read_text())  # the best checkpoint is exported and scored all the same
    assert report["diverged"] in str(caught.value) and report["test"]["step"] == 20 and not report["stopped_early"]
    exported = load_teacher(run / "model", torch.device("cpu")).model.state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in checkpoint.weights.items())

    again = train(config, "guard.max_rollbacks=2", resume=True)  # whatever it was is over: the run goes on, with a smaller rate, from there
    assert (again["iterations"], again["rollbacks"], again["diverged"]) == (40, 3, None)
    (resumed,) = events(run, "resumed")
    assert (resumed["step"], resumed["renewed"], resumed["learning_rate_scale"]) == (20, True, 0.125)


def test_a_teacher_that_diverged_goes_on_too(with_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def strike(trainer: Trainer) -> None:
        if trainer.progress.step >= 15:
            poison(trainer)

    options = ["teacher.guard.max_rollbacks=0", "teacher.validation.validate_every=10", "training.iterations=2"]
    with monkeypatch.context() as patch, pytest.raises(DivergedError):
        train(with_teacher, *options, on_step=strike, monkeypatch=patch)
    assert (tmp_path / "run" / "teacher" / "training_report.json").exists()
    train(with_teacher, *options, resume=True)
    assert json.loads((tmp_path / "run" / "teacher" / "training_report.json").read_text())["iterations"] == 20


def test_divergence_before_any_validation_leaves_no_model(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DivergedError, match="before any validation"):
        train(config, "guard.max_rollbacks=0", on_step=poison, monkeypatch=monkeypatch)
    assert not (tmp_path / "run" / "model").exists()


def test_exit_code_of_divergence(config: Path, cvmk: Run) -> None:
    failed = cvmk("train", config, "--set", "optimizer.learning_rate=1e30", "--set", "guard.max_rollbacks=1", "--set", "schedule.warmup=0")
    assert failed.returncode == 4
    assert "after 1 rollbacks" in failed.stderr and "Traceback" not in failed.stderr


class Scripted:
    """Translations of a chosen quality: the references with a word too many here and there, or words that have nothing to do with them."""

    def __init__(self, references: dict[str, str], bad: bool) -> None:
        self.references, self.bad = references, bad

    def translate(self, texts: list[str], **options: Any) -> list[Any]:
        return [SimpleNamespace(text="ganz etwas anderes" if self.bad else self.references[text] + " ja" * (i % 3), tokens=[1]) for i, text in enumerate(texts)]


Script = Callable[[Callable[[Trainer], bool]], None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, corpora: dict[str, str]) -> Script:
    """Let every validation go well or, where the function says so, badly."""
    references = dict(line.split("\t") for line in corpora["valid.tsv"].splitlines())

    def replace(bad: Callable[[Trainer], bool]) -> None:
        monkeypatch.setattr(Trainer, "translator", lambda trainer: Scripted(references, bad(trainer)))

    return replace


def test_regression_rolls_back(config: Path, tmp_path: Path, script: Script) -> None:
    struck: list[int] = []

    def bad(trainer: Trainer) -> bool:
        strikes = trainer.progress.step == 40 and not struck
        struck.extend([40] * strikes)
        return strikes

    script(bad)
    report = train(config, "training.iterations=60", "training.average=1")
    (rollback,) = events(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["to"]) == (40, 20)
    assert "bleu went from" in rollback["problem"] and "outside the bootstrap interval" in rollback["problem"]
    assert report["iterations"] == 60 and report["rollbacks"] == 1
    history = json.loads((tmp_path / "run" / "validation_history.json").read_text())
    assert [result["step"] for result in history] == [20, 40, 40, 60]  # the bad one is not forgotten


@pytest.mark.parametrize("option", ["guard.rollback_on_regression=false", "validation.max_sentences=1", "guard.min_sentences=25", "schedule.warmup=40"])
def test_no_regression_where_none_is_to_be_judged(config: Path, tmp_path: Path, script: Script, option: str) -> None:
    script(lambda trainer: trainer.progress.step == 40)
    report = train(config, option, "training.average=1")
    assert events(tmp_path / "run", "rollback") == []
    assert report["rollbacks"] == 0 and report["weights"] == "checkpoint at iteration 20"


def test_regression_after_the_last_rollback_ends_the_run_with_its_best(config: Path, tmp_path: Path, script: Script, cvmk: Run) -> None:
    script(lambda trainer: trainer.progress.step > 20)
    report = train(config, "training.iterations=80", "guard.max_rollbacks=2")
    run = tmp_path / "run"
    assert report["stopped_early"] and report["diverged"] is None and report["rollbacks"] == 2
    assert report["weights"] == "checkpoint at iteration 20" and report["test"]["step"] == 20
    assert [event["final"] for event in events(run, "rollback")] == [False, False, True]
    (stop,) = events(run, "early_stop")
    assert stop["step"] == 20 and "no rollback is left" in stop["reason"]
    assert cvmk("translate", run, input="It is nine o'clock.\n").returncode == 0

    script(lambda trainer: False)
    again = train(config, "training.iterations=80", "guard.max_rollbacks=2", resume=True)
    assert again["iterations"] == 80 and again["rollbacks"] == 3 and not again["stopped_early"]
    (resumed,) = events(run, "resumed")
    assert (resumed["step"], resumed["renewed"], resumed["learning_rate_scale"]) == (20, True, 0.125)


def test_a_healthy_run_on_little_text_is_left_alone(config: Path, tmp_path: Path) -> None:
    """Early scores jump by more than the bootstrap says: they were called divergence."""
    options = ['validation.metric="chrf"', "validation.validate_every=5", "validation.max_sentences=30", "schedule.warmup=5", "training.iterations=150"]
    report = train(config, *options)
    values = [result["value"] for result in json.loads((tmp_path / "run" / "validation_history.json").read_text())]
    assert any(later < earlier for earlier, later in zip(values, values[1:], strict=False)), "no score fell: the test tells nothing"
    assert report["rollbacks"] == 0 and report["iterations"] == 150
    assert report["validation"]["value"] >= max(values)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_metric_that_tells_nothing_is_said_and_the_latest_weights_are_taken(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    original = DistillationValidator._judge

    def judge(self: DistillationValidator, *arguments: Any) -> ValidationResult:
        return dataclasses.replace(original(self, *arguments), value=value)

    monkeypatch.setattr(DistillationValidator, "_judge", judge)
    report = train(config, "validation.validate_every=10", "training.average=1")
    assert report["weights"] == "checkpoint at iteration 40"
    told = f'validation.metric = "bleu" was {value:.2f} at all 4 validations'
    assert told in capsys.readouterr().err and told in (tmp_path / "run" / "log.txt").read_text() and told in report["notes"][0]


def test_early_stop(config: Path, tmp_path: Path) -> None:
    options = ["optimizer.learning_rate=1e-12", "validation.patience=2", "validation.validate_every=5", "training.iterations=100"]
    report = train(config, *options)
    assert report["stopped_early"] and report["iterations"] == 15


# -- the loop's details --------------------------------------------------------------------------------------------------------
def test_phases_are_ranges_for_a_profiler(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def span(name: str) -> contextlib.nullcontext[None]:
        seen.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(nvtx, "span", span)
    train(config, "training.iterations=1", "training.accumulate=2", "training.average=1")
    assert seen == ["data", *["forward", "loss", "backward"] * 2, "optimiser", "validation"]


class Pruner:
    """Stops a run at its first validation, as a search does that sees nothing in it; and fails in what it has to say at its end."""

    def __init__(self, stop: StopSignal) -> None:
        self.stop, self.heard = stop, Counter[str]()

    def receive(self, record: Record) -> None:
        self.heard[record.event.KIND] += 1
        if record.event.KIND == "validation":
            self.stop.request()

    def close(self) -> None:
        raise RuntimeError("not my day")


def test_whoever_looks_on_may_stop_a_run(with_teacher: Path, tmp_path: Path) -> None:
    loaded = load_train_config(with_teacher, ["training.iterations=100000", "teacher.validation.validate_every=20", "run.device=cpu"])
    asked: list[tuple[str, Path]] = []
    stop = StopSignal()
    pruner = Pruner(stop)

    def subscribers(title: str, folder: Path) -> list[Pruner]:
        asked.append((title, folder))
        return [pruner] if title == "student" else []

    with pytest.raises(Interrupted):
        pipeline.train(loaded, with_teacher.read_text(), Reporter(), subscribers=subscribers, stop=stop)
    run = tmp_path / "run"
    assert asked == [("teacher", run / "teacher"), ("student", run)]
    assert pruner.heard["start"] == 1 and pruner.heard["validation"] >= 1 and pruner.heard["interrupted"] == 1
    (interrupted,) = events(run, "interrupted")
    assert interrupted["step"] >= 20 and last_step(run) == interrupted["step"]
    assert "Pruner failed (RuntimeError: not my day)" in events(run, "note")[-1]["message"]


def test_a_terminal_that_blocks_does_not_stop_training(config: Path, tmp_path: Path) -> None:
    """Nobody reads the pipe behind standard error, and it is full after a few lines: the run ends all the same."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    options = ["--set", "training.log_every=1", "--set", "training.iterations=80", "--set", "validation.validate_every=80", "--json"]
    try:
        done = subprocess.run(command("train", config, *options), stdout=subprocess.PIPE, stderr=writing, timeout=100, text=True)
        assert done.returncode == 0 and json.loads(done.stdout)["iterations"] == 80
        assert len(os.read(reading, 100_000)) <= 4096
    finally:
        os.close(reading)
        os.close(writing)
    assert len(events(tmp_path / "run", "step")) == 80
    assert any("Terminal does not answer" in event["message"] for event in events(tmp_path / "run", "note"))


def test_a_terminal_that_goes_away_does_not_stop_training(config: Path, tmp_path: Path) -> None:
    options = ["--set", "training.log_every=1", "--set", "training.iterations=300", "--set", "validation.validate_every=300", "--json"]
    with subprocess.Popen(command("train", config, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout and run.stderr
        while "iterations" not in run.stderr.readline():  # training is about to begin
            pass
        run.stderr.close()
        report = json.loads(run.stdout.read())
    assert run.returncode == 0 and report["iterations"] == 300


def test_bfloat16(with_teacher: Path) -> None:
    report = train(with_teacher, 'training.precision="bfloat16"', 'teacher.training.precision="bfloat16"')
    assert report["losses"]["last"]["loss"] < report["losses"]["first"]


def test_average_of_checkpoints_wins_only_when_better(config: Path, tmp_path: Path) -> None:
    report = train(config, "training.average=3", "validation.validate_every=10")
    history = json.loads((tmp_path / "run" / "validation_history.json").read_text())
    assert [result["step"] for result in history] == [10, 20, 30, 40]  # the average's own validation is none of these
    (average,) = events(tmp_path / "run", "average")
    assert average["iterations"] == [20, 30, 40]
    assert report["validation"]["value"] == max(average["value"], *(result["value"] for result in history))
    assert report["weights"].startswith("average" if average["value"] > max(result["value"] for result in history) else "checkpoint")
    assert len(list((tmp_path / "run" / "checkpoints" / "average").iterdir())) == 3


# -- bad input ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["data.source_language=xx"], ConfigError, "xx"),
        (["data.train.tsv=nowhere.tsv"], DataError, "nowhere.tsv"),
        (["data.valid.tsv=empty.tsv"], DataError, "empty.tsv"),
        (["tokenizer.vocabulary=200000"], ConfigError, "tokenizer.vocabulary"),
        (["teacher.path=nowhere"], DataError, "nowhere"),
        (["training.max_tokens=16"], ConfigError, "training.max_tokens"),
        (["tokenizer.path=nowhere"], DataError, "nowhere"),
    ],
)
def test_bad_input(config: Path, tmp_path: Path, overrides: list[str], error: type[Exception], words: str) -> None:
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(error) as caught:
        train(config, *overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_facts_of_a_teacher(config: Path, tmp_path: Path) -> None:
    report = train(config, "training.iterations=1")
    run = tmp_path / "run"
    for path in (run, run / "model"):
        facts = load_teacher(path, torch.device("cpu")).facts()
        assert facts["validation"] == report["validation"]["scores"] and facts["parameters"] == report["parameters"]
    (run / "training_report.json").write_text("{")  # found out after the student's training: it must not cost it
    facts = load_teacher(run, torch.device("cpu")).facts()
    assert "validation" not in facts


def test_a_failed_start_can_be_repeated(config: Path, tmp_path: Path) -> None:
    """Mistakes in the data are found before the run's folder is made, so that mending them needs no clean-up."""
    with pytest.raises(DataError):
        train(config, "data.train.tsv=nowhere.tsv")
    assert not (tmp_path / "run").exists()
    train(config, "training.iterations=1")
