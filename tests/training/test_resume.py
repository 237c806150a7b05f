"""A run that was killed, interrupted or met a full disk goes on as if nothing had happened."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import command, events, last_step, train

from cvmk.config import TeacherConfig
from cvmk.errors import ConfigError, DataError
from cvmk.files import followed
from cvmk.inference import Translator
from cvmk.nn import MIXERS
from cvmk.training.checkpoint import CheckpointStore
from cvmk.training.trainer import Trainer

Run = Callable[..., subprocess.CompletedProcess[str]]


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    end = time.monotonic() + 90
    while last_step(folder) < step:
        assert process.poll() is None, f"the run ended before iteration {step}"
        assert time.monotonic() < end, f"no checkpoint at {step} in 90 seconds"
        time.sleep(0.005)


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_kill_and_resume_is_bit_for_bit(config: Path, tmp_path: Path, cvmk: Run) -> None:
    options = [config, "--set", "training.iterations=100", "--set", "model.attention_dropout=0.1", "--set", "validation.max_sentences=5"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(config, *options[2::2], f"run.folder={straight}")

    start = subprocess.Popen(command("train", *options, "--set", f"run.folder={killed}"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True)
    wait_for_step(start, killed, 50)
    start.kill()
    start.wait()
    stopped_at = last_step(killed)
    assert stopped_at < 100, "the run ended before it was killed"
    done = cvmk("train", *options, "--set", f"run.folder={killed}", "--resume")
    assert done.returncode == 0, done.stderr
    assert events(killed, "resumed")[0]["step"] == stopped_at

    for step in ("step-100", "best"):
        one, other = (followed(folder / "checkpoints" / step) / "model.safetensors" for folder in (straight, killed))
        assert one.read_bytes() == other.read_bytes()
    assert weights(straight) == weights(killed)
    one_state, other_state = ((folder / "checkpoints" / "step-100" / "state.pt").read_bytes() for folder in (straight, killed))
    assert one_state == other_state


@pytest.mark.parametrize("name", sorted({*MIXERS} - {"attention"}))
def test_a_run_of_recurrent_mixers_resumes_bit_for_bit(name: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides have the mixer; a run that dies behind its checkpoint at 10 of 14 iterations ends with the weights of one that does not."""

    def die(trainer: Trainer) -> None:
        if trainer.progress.step == 12:
            raise Killed

    short = ["training.iterations=14", "validation.max_sentences=3", "validation.validate_every=14", "training.max_tokens=200"]
    short += [f'model.{side}_mixers=["{name}"]' for side in ("encoder", "decoder")]
    train(config, *short, f"run.folder={tmp_path / 'straight'}")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        train(config, *short, on_step=die, monkeypatch=patch)
    assert last_step(tmp_path / "run") == 10
    train(config, *short, resume=True)
    assert weights(tmp_path / "straight") == weights(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_writes_a_checkpoint(config: Path, tmp_path: Path, number: signal.Signals) -> None:
    options = [config, "--set", "training.iterations=100000", "--set", "training.save_every=1000", "--set", "validation.validate_every=100000"]
    start = subprocess.Popen(command("train", *options), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for_step(start, tmp_path / "run", 0)
    time.sleep(0.3)
    start.send_signal(number)
    _, errors = start.communicate(timeout=60)
    assert start.returncode == 130
    assert "--resume" in errors and "Traceback" not in errors
    step = events(tmp_path / "run", "interrupted")[0]["step"]
    assert last_step(tmp_path / "run") == step
    train(config, *options[2::2], f"training.iterations={step + 5}", resume=True)
    assert events(tmp_path / "run", "resumed")[0]["step"] == step


def test_full_disk_keeps_the_last_checkpoint(config: Path, tmp_path: Path, cvmk: Run) -> None:
    train(config)

    def limit() -> None:  # files may not grow beyond this: the checkpoint does not fit, the logs do
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    options = [config, "--set", "training.iterations=60", "--resume"]
    failed = cvmk("train", *options, preexec_fn=limit)
    assert failed.returncode == 5
    assert failed.stderr.count("cvmk: cannot write") == 1 and "Traceback" not in failed.stderr
    assert last_step(tmp_path / "run") == 40
    train(config, "training.iterations=60", resume=True)
    assert last_step(tmp_path / "run") == 60


def test_damaged_checkpoint_is_named(config: Path, tmp_path: Path, cvmk: Run) -> None:
    train(config)
    path = tmp_path / "run" / "checkpoints" / "step-40" / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    failed = cvmk("train", config, "--set", "training.iterations=60", "--resume")
    assert failed.returncode == 5
    assert "state.pt is corrupt or truncated" in failed.stderr and "Traceback" not in failed.stderr


# -- crash windows -------------------------------------------------------------------------------------------------------------
class Killed(BaseException):
    """Nothing between here and the top may answer it."""


def test_killed_between_a_checkpoint_and_its_pointers(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`last` already points at a better checkpoint, `best` does not yet: it must not be pruned as one of many."""
    original = CheckpointStore.point

    def point(store: CheckpointStore, name: str, step: int) -> None:
        if (name, step) == ("best", 20):
            raise Killed
        original(store, name, step)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "point", point)
        with pytest.raises(Killed):
            train(config)
    assert (tmp_path / "run" / "checkpoints" / "step-20").is_dir()
    monkeypatch.setattr("cvmk.validation.DistillationValidator._gain", lambda self, value, reference: -1.0)  # 20 stays the best
    report = train(config, "training.iterations=80", "guard.rollback_on_regression=false", resume=True)
    assert report["weights"] == "checkpoint at iteration 20"


def test_killed_during_the_final_evaluation(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object, **options: object) -> None:
        raise Killed

    straight = train(config, f"run.folder={tmp_path}/straight")
    with monkeypatch.context() as patch:
        patch.setattr("cvmk.training.pipeline.save_model_folder", killed)
        with pytest.raises(Killed):
            train(config)
    resumed = train(config, resume=True)
    assert resumed["validation"]["value"] == straight["validation"]["value"] and resumed["losses"] == straight["losses"]
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    history = json.loads((tmp_path / "run" / "validation_history.json").read_text())
    assert [result["step"] for result in history] == [20, 40]


def test_killed_while_the_teacher_trains_and_translates(with_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["training.iterations=10", "distillation.sequence_level.enabled=true", "distillation.sequence_level.beam_size=1", "teacher.training.save_every=5"]
    train(with_teacher, *options, f"run.folder={tmp_path}/straight")

    def strike(trainer: Trainer) -> None:
        if isinstance(trainer.recipe, TeacherConfig) and trainer.progress.step == 13:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        train(with_teacher, *options, on_step=strike, monkeypatch=patch)
    assert last_step(tmp_path / "run" / "teacher") == 10

    original, calls = Translator.translate, []

    def translate(self: object, texts: list[str], **search: object) -> object:
        calls.append(len(texts))
        if len(texts) == 100 and calls.count(100) == 2:
            raise Killed
        return original(self, texts, **search)  # type: ignore[arg-type]

    monkeypatch.setattr("cvmk.training.materials._CHUNK", 100)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Translator, "translate", translate)
        train(with_teacher, *options, resume=True)
    (unfinished,) = (tmp_path / "run" / "cache").glob("teacher-train-*.jsonl")
    assert len(unfinished.read_text().splitlines()) == 100
    with open(unfinished, "a") as file:
        file.write('"half a li')
    train(with_teacher, *options, resume=True)
    (finished,) = (tmp_path / "straight" / "cache").glob("teacher-train-*.jsonl")
    assert unfinished.name == finished.name and unfinished.read_bytes() == finished.read_bytes()
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert weights(tmp_path / "run" / "teacher") == weights(tmp_path / "straight" / "teacher")


# -- a run that was moved ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("links", [True, False])
def test_a_copied_run_goes_on_and_translates(config: Path, tmp_path: Path, cvmk: Run, links: bool) -> None:
    """Copied with everything followed (cp -rL), from a run with pointers or from one of an older cvmk with links."""
    train(config)
    run = tmp_path / "run"
    shutil.rmtree(run / "model")  # as if it had not come to its end: its best checkpoint is its model
    if links:
        for name in ("best", "last"):
            target = followed(run / "checkpoints" / name).name
            (run / "checkpoints" / name).unlink()
            (run / "checkpoints" / name).symlink_to(target)
    done = cvmk("translate", run, input="It is nine o'clock.\n")
    assert done.returncode == 0, done.stderr
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    again = cvmk("translate", copy, input="It is nine o'clock.\n")
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    for folder in (run, copy):
        resumed = train(config, f"run.folder={folder}", "training.iterations=60", resume=True)
        assert resumed["iterations"] == 60 and events(folder, "resumed")[0]["step"] == 40
        assert last_step(folder) == 60
    assert weights(run) == weights(copy)


# -- what may change under a resumed run -------------------------------------------------------------------------------------------
def test_a_finished_run_resumed_stays_as_it_is(config: Path, tmp_path: Path) -> None:
    report = train(config)
    before = weights(tmp_path / "run")
    again = train(config, resume=True)
    assert weights(tmp_path / "run") == before and again["losses"] == report["losses"]
    assert again["validation"]["scores"] == report["validation"]["scores"]


def test_more_patience_wakes_a_run_that_stopped_early(config: Path) -> None:
    options = ["optimizer.learning_rate=1e-12", "validation.validate_every=5", "training.iterations=30"]
    assert train(config, *options, "validation.patience=2")["iterations"] == 15
    assert train(config, *options, "validation.patience=2", resume=True)["iterations"] == 15
    report = train(config, *options, "validation.patience=4", resume=True)
    assert report["iterations"] == 25 and report["stopped_early"]


def test_fewer_iterations_than_were_done_without_a_validation(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def strike(trainer: Trainer) -> None:
        if trainer.progress.step == 12:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        train(config, on_step=strike, monkeypatch=patch)
    report = train(config, "training.iterations=5", resume=True)
    assert report["iterations"] == 10 and report["validation"]["step"] == 10


@pytest.mark.parametrize("override", ["run.seed=2", "validation.metric=chrf", "validation.beam_size=2", "model.dropout=0.2"])
def test_a_past_of_another_run_is_refused(config: Path, override: str) -> None:
    train(config, "training.iterations=2")
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        train(config, "training.iterations=2", override, resume=True)


def test_best_checkpoint_is_a_model(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cvmk: Run) -> None:
    def strike(trainer: Trainer) -> None:
        if trainer.progress.step == 25:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        train(config, on_step=strike, monkeypatch=patch)
    done = cvmk("translate", tmp_path / "run", input="It is nine o'clock.\n\n")
    assert done.returncode == 0 and done.stdout.count("\n") == 2, done.stderr


@pytest.mark.parametrize("key", ["progress", "sampler", "guard", "validator"])
def test_a_state_that_lacks_something_is_named(config: Path, tmp_path: Path, key: str) -> None:
    train(config, "training.iterations=2")
    path = tmp_path / "run" / "checkpoints" / "step-2" / "state.json"
    state = json.loads(path.read_text())
    del state[key]
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match="step-2 is corrupt"):
        train(config, "training.iterations=3", resume=True)
