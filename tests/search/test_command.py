"""`cvmk search` as it is called, with workers that train."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from runs import command
from scripted_workers import events

from cvmk.cli import main
from cvmk.config.loading import load_train_config
from cvmk.files import read_json

TOML = """
[run]
folder = "{folder}/run"
threads = 1

[data]
embedded = "phrasebook"
phrasebook_pairs = 1000

[tokenizer]
vocabulary = 400

[model]
d_model = 32
ffn = 64
heads = 2
encoder_layers = 1
decoder_layers = 1

[schedule]
warmup = 2

[guard]
max_rollbacks = 0

[training]
iterations = {iterations}
max_tokens = 500
save_every = 5
average = 1

[validation]
validate_every = 5
max_sentences = 10
bootstrap = 50
metric = "chrf"
metrics = ["chrf"]

[search]
folder = "{folder}/search"
trials = {trials}
sampler = "random"
pruner = "none"
seed = 3

[search.space]
optimizer.learning_rate = {{ choices = [3e-3, 1e-2, 1e30] }}
model.dropout = {{ low = 0.0, high = 0.2 }}
"""


def write(tmp_path: Path, iterations: int, trials: int) -> str:
    path = tmp_path / "search.toml"
    path.write_text(TOML.format(folder=tmp_path, iterations=iterations, trials=trials))
    return str(path)


def test_a_real_search_and_its_best_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A trial that diverges has failed; the best configuration gives, when it is run as it is, the score that it had in the search."""
    assert main(["search", write(tmp_path, 10, 3), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["counts"].keys() == {"complete", "failed"} and len(result["trials"]) == 3
    for one in result["trials"]:
        assert (one["state"] == "failed") == (one["parameters"]["optimizer.learning_rate"] == 1e30)
        assert one["state"] != "failed" or "training diverged at iteration" in one["reason"]
    threads = torch.get_num_threads()
    try:
        assert main(["train", str(tmp_path / "search/best.toml")]) == 0
    finally:
        torch.set_num_threads(threads)
    report = read_json(tmp_path / "search/best/training_report.json")
    assert report["validation"]["value"] == result["best"]["value"] and report["test"] is not None
    of_trial = read_json(tmp_path / f"search/trials/{result['best']['number']:04d}/training_report.json")
    assert of_trial["validation"]["samples"] == report["validation"]["samples"] and of_trial["losses"] == report["losses"]


def started(tmp_path: Path, count: int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return len(events(tmp_path / "search", "trial_score")) >= count
    return False


def workers(tmp_path: Path) -> list[int]:
    """The processes of the search's workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"cvmk.search.worker" in (line := path.read_bytes()) and os.fsencode(tmp_path) in line:
                found.append(int(path.parent.name))
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_the_same_command_goes_on(tmp_path: Path, how: signal.Signals):
    """Twice interrupted or killed, with two workers."""
    path = write(tmp_path, 25, 4)
    words = command("search", path, "--workers", "2", "--set", "search.space.optimizer.learning_rate.choices=[1e-3, 3e-3]")
    for count in (2, 7):
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as search:
            while not started(tmp_path, count) and search.poll() is None:
                time.sleep(0.02)
            os.killpg(search.pid, how) if how == signal.SIGINT else search.send_signal(how)
            assert search.stderr
            told = search.stderr.read()
        assert search.returncode == (-how if how == signal.SIGKILL else 130), told
        if how != signal.SIGKILL:
            assert "no trial is lost; go on with: cvmk search" in told
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = [event["trial"] for event in events(tmp_path / "search", "trial_end")]
    assert sorted(ends) == [*range(4)] and read_json(tmp_path / "search/search_report.json")["counts"] == {"complete": 4}
    for number in range(4):  # went on from a checkpoint: no iteration was validated twice
        steps = [event["step"] for event in events(tmp_path / f"search/trials/{number:04d}", "validation")]
        assert sorted({*steps}) == [*range(5, 26, 5)] and len(steps) <= 7
    assert not workers(tmp_path)


@pytest.mark.exhaustive
def test_a_worker_that_is_killed_costs_its_trial(tmp_path: Path):
    words = command("search", write(tmp_path, 25, 3), "--set", "search.space.optimizer.learning_rate.choices=[1e-3, 3e-3]")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as search:
        while not started(tmp_path, 2):
            time.sleep(0.02)
        (worker,) = workers(tmp_path)
        os.kill(worker, signal.SIGKILL)
        assert search.stderr
        told = search.stderr.read()
    assert search.returncode == 0, told
    report = read_json(tmp_path / "search/search_report.json")
    assert report["counts"] == {"failed": 1, "complete": 2} and "SIGKILL, as where the machine runs out of memory" in report["trials"][0]["reason"]


@pytest.mark.exhaustive
def test_a_search_with_a_teacher(tmp_path: Path):
    """It is trained once; what it says is made once, though two workers need it at the same time; and the best configuration takes it."""
    path = Path(write(tmp_path, 10, 4))
    space = "[search.space]\ndistillation.alpha = { low = 0.1, high = 0.9 }\ndistillation.temperature = { low = 1, high = 4 }\n"
    teacher = "[teacher.model]\nd_model = 48\nffn = 64\nheads = 2\nencoder_layers = 1\ndecoder_layers = 1\n"
    teacher += "[teacher.training]\niterations = 5\nmax_tokens = 500\n"
    rest = "[teacher.validation]\nmax_sentences = 10\nbootstrap = 50\n[distillation]\nsequence_level = { enabled = true }\n"
    path.write_text(path.read_text().split("[search.space]")[0] + space + teacher + rest)
    assert main(["search", str(path), "--workers", "2"]) == 0
    taught = [events(folder, "teacher")[0] for folder in (tmp_path / "search/trials").iterdir()]
    assert len(taught) == 4 and len({one["fingerprint"] for one in taught}) == 1
    assert len(events(tmp_path / "search/teacher", "start")) == 1
    for name, sentences in (("train", 1000), ("valid", 10)):
        (said,) = (tmp_path / "search/cache").glob(f"teacher-{name}-*.jsonl")
        assert len(said.read_text().splitlines()) == sentences
    best = load_train_config(tmp_path / "search/best.toml")
    assert best.teacher is not None and best.teacher.path == str(tmp_path / "search/teacher")


def test_the_table_in_a_terminal(tmp_path: Path):
    """Rows of trials, the budget, and what failed: drawn for a terminal that is as wide as it says."""
    from rich.console import Console

    from cvmk.search.table import _Table
    from cvmk.telemetry import Record
    from cvmk.telemetry.schema import SearchStarted, TrialEnded, TrialScored, TrialStarted, TrialTick

    with open(tmp_path / "screen", "w") as stream:
        table = _Table(Console(file=stream, width=140, force_terminal=True, color_system=None))
        for event in (
            SearchStarted("mine", "chrf", "maximize", "tpe", "median", {"model.ffn": {}}, {"trials": 9}),
            TrialStarted(0, {"model.ffn": 64, "optimizer.learning_rate": 0.00123456}), TrialScored(0, 10, "chrf", 12.5, True),
            TrialEnded(0, "complete", 12.5, 40, 61.0, best=True), TrialStarted(1, {"model.ffn": 128, "optimizer.learning_rate": 0.5}),
            TrialTick(1, 17, 3.0),
            TrialStarted(2, {"model.ffn": 96, "optimizer.learning_rate": 0.1}), TrialEnded(2, "failed", None, 3, 2.0, "not enough memory"),
        ):  # fmt: skip
            table.receive(Record.now(event))
        with table.console.capture() as captured:
            table.console.print(table.rendered())
        table.close()
    lines = [line.split() for line in captured.get().splitlines()]
    assert ["0", "complete", "40", "12.50*", "1:01", "64", "0.001235"] in lines
    assert any(line[:3] == ["1", "running", "17"] for line in lines) and any(line[:3] == ["2", "failed", "3"] and "memory" in line for line in lines)
    assert "1 complete, 1 failed; budget 9 trials" in captured.get()


def test_a_missing_package_is_told_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    path = write(tmp_path, 10, 3)
    for options in ([], ["--check"]):
        assert main(["search", path, *options]) == 2
        assert "pip install 'cvmk[search]'" in capsys.readouterr().err and not (tmp_path / "search").exists()
