"""A run that was killed, interrupted or met a full disk goes on as if nothing had happened."""

from __future__ import annotations

import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import command, events, last_step

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
    options = [config, "--set", "training.iterations=100", "--set", "model.attention_dropout=0.1"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = cvmk("train", *options, "--set", f"run.folder={straight}")
    assert done.returncode == 0, done.stderr

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
        one, other = (folder / "checkpoints" / step / "model.safetensors" for folder in (straight, killed))
        assert one.read_bytes() == other.read_bytes()
    assert weights(straight) == weights(killed)
    one_state, other_state = ((folder / "checkpoints" / "step-100" / "state.pt").read_bytes() for folder in (straight, killed))
    assert one_state == other_state


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_writes_a_checkpoint(config: Path, tmp_path: Path, cvmk: Run, number: signal.Signals) -> None:
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
    done = cvmk("train", *options, "--set", f"training.iterations={step + 5}", "--resume")
    assert done.returncode == 0, done.stderr
    assert events(tmp_path / "run", "resumed")[0]["step"] == step


def test_full_disk_keeps_the_last_checkpoint(config: Path, tmp_path: Path, cvmk: Run) -> None:
    done = cvmk("train", config)
    assert done.returncode == 0, done.stderr

    def limit() -> None:  # files may not grow beyond this: the checkpoint does not fit, the logs do
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    options = [config, "--set", "training.iterations=60", "--resume"]
    failed = cvmk("train", *options, preexec_fn=limit)
    assert failed.returncode == 5
    assert failed.stderr.count("cvmk: cannot write") == 1 and "Traceback" not in failed.stderr
    assert last_step(tmp_path / "run") == 40
    done = cvmk("train", *options)
    assert done.returncode == 0, done.stderr
    assert last_step(tmp_path / "run") == 60


def test_damaged_checkpoint_is_named(config: Path, tmp_path: Path, cvmk: Run) -> None:
    assert cvmk("train", config).returncode == 0
    path = tmp_path / "run" / "checkpoints" / "step-40" / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    failed = cvmk("train", config, "--set", "training.iterations=60", "--resume")
    assert failed.returncode == 5
    assert "state.pt is corrupt or truncated" in failed.stderr and "Traceback" not in failed.stderr
