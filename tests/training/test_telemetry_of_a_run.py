"""What a training writes down of itself: every iteration once, through rollbacks, full logs and resumptions, and what `[telemetry]` asks for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from runs import train

from cvmk.config.loading import load_train_config
from cvmk.errors import ConfigError
from cvmk.telemetry import Curves, read_events
from cvmk.telemetry.schema import Anomaly, Epoch, Iterations, Profiled, Resources, Step
from cvmk.training.run_folder import open_run
from cvmk.training.trainer import Trainer


def test_every_iteration_is_written_and_every_epoch_summed_up(config: Path, tmp_path: Path) -> None:
    more = ["telemetry.tensorboard=true", "telemetry.profile=3", "telemetry.profile_after=5"]
    train(config, "training.iterations=50", *more)
    records, problems = read_events(tmp_path / "run" / "events.jsonl")
    found = [record.event for record in records]
    assert problems == []
    series = Curves(records).series
    assert series["loss"].steps == list(range(1, 51)) == series["data_wait"].steps
    assert series["loss"].values[0] > series["loss"].values[-1]
    logged = {event.step: event for event in found if isinstance(event, Step)}
    for step in (10, 50):
        assert series["loss"].values[step - 1] == pytest.approx(logged[step].loss, rel=1e-5)
        assert series["learning_rate"].values[step - 1] == pytest.approx(logged[step].learning_rate, rel=1e-5)
    epochs = [event for event in found if isinstance(event, Epoch)]
    assert sum(epoch.iterations for epoch in epochs) == 50 and epochs[0].whole and [epoch.epoch for epoch in epochs] == list(range(1, len(epochs) + 1))
    assert epochs[-1].step == 50 and len(epochs) > 1
    assert any(isinstance(event, Resources) for event in found)
    [profiled] = [event for event in found if isinstance(event, Profiled)]
    assert profiled.step == 6 and profiled.iterations == 3 and all((tmp_path / "run" / name).exists() for name in profiled.files)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1 and not (tmp_path / "run" / "plots").exists()


def test_little_is_written_where_little_is_asked_for(config: Path, tmp_path: Path) -> None:
    train(config, "training.iterations=10", "telemetry.iterations=false", "telemetry.anomalies=false", "telemetry.resources_every=0")
    kinds = {json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()}
    assert "step" in kinds and not kinds & {"iterations", "anomaly", "resources"}


def test_a_divergence_is_an_anomaly_and_no_part_of_the_curve(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spoil(trainer: Trainer) -> None:
        seen.append(trainer.progress.step)
        if len(seen) == 24:
            next(iter(trainer.model.parameters())).data.fill_(float("nan"))

    train(config, on_step=spoil, monkeypatch=monkeypatch)
    records, _ = read_events(tmp_path / "run" / "events.jsonl")
    spoiled = [record.event for record in records if isinstance(record.event, Anomaly) and math.isnan(record.event.value)]
    assert [(event.quantity, event.step) for event in spoiled] == [("loss", 25), ("gradient_norm", 25)]
    loss = Curves(records).series["loss"]
    assert loss.steps == list(range(1, 41)) and all(map(math.isfinite, loss.values))


def test_a_resumed_run_goes_on_in_its_log_whose_files_are_small(config: Path, tmp_path: Path) -> None:
    small = ["telemetry.log_bytes=10000", "telemetry.log_files=50"]
    train(config, "training.iterations=20", *small)
    train(config, "training.iterations=40", *small, resume=True)
    run = tmp_path / "run"
    assert len(list(run.glob("events.*.jsonl"))) >= 1 and all(path.stat().st_size <= 10000 for path in run.glob("events.*.jsonl"))
    records, problems = read_events(run / "events.jsonl")
    assert problems == [] and Curves(records).series["loss"].steps == list(range(1, 41))
    assert sum(len(record.event.loss) for record in records if isinstance(record.event, Iterations)) == 40


HOLD = """
import sys, time
from pathlib import Path
from cvmk.config.loading import load_train_config
from cvmk.training.run_folder import open_run
with open_run(load_train_config(Path(sys.argv[1])), "", {}, resume=False, restart=False) as folder:
    (folder / "checkpoints").mkdir()
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_processes_do_not_train_in_one_folder(config: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, config], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for again in ({"resume": True, "restart": False}, {"resume": False, "restart": True}):
            with pytest.raises(ConfigError, match="another process is training in"), open_run(load_train_config(config), "", {}, **again):
                pass
    finally:
        other.kill()
        other.wait()
    with open_run(load_train_config(config), "", {}, resume=True, restart=False) as folder:  # its lock has died with it
        assert (folder / "checkpoints").exists()
