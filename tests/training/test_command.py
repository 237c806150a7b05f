"""`cvmk train` as it is called: configurations from anywhere, what the run keeps of them, commands that can be pasted."""

from __future__ import annotations

import io
import lzma
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import command, last_step

from cvmk.cli import main
from cvmk.config.loading import load_train_config

SHORT = ["--set", "training.iterations=2", "--set", "validation.max_sentences=2"]
Run = Callable[..., subprocess.CompletedProcess[str]]


def pipe(text: str) -> str:
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    return f"/dev/fd/{reading}"


def test_a_byte_order_mark(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert main(["train", str(config), "--check"]) == 0
    assert "is a valid configuration" in capsys.readouterr().out
    config.write_bytes(config.read_text("utf-8-sig").encode("utf-16"))
    assert main(["train", str(config), "--check"]) == 5
    assert "config.toml is UTF-16 text: convert it to UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["fifo", "-"])
def test_a_configuration_from_a_pipe_is_kept_as_it_was_read(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    text = config.read_text()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.replace("iterations = 40", "iterations = 2").encode())))
    assert main(["train", how if how == "-" else pipe(text.replace("iterations = 40", "iterations = 2"))]) == 0
    assert (tmp_path / "run" / "config.toml").read_text() == text.replace("iterations = 40", "iterations = 2")


def test_a_run_resumes_with_its_own_configuration(config: Path, tmp_path: Path) -> None:
    overrides = [*SHORT, "--set", "model.ffn=48", "--set", f"run.folder={tmp_path}/a run"]
    assert main(["train", str(config), *overrides]) == 0
    kept = tmp_path / "a run" / "config.toml"
    assert load_train_config(kept) == load_train_config(config, overrides[1::2])
    assert main(["train", str(kept), "--resume"]) == 0
    assert main(["train", str(config), "--resume", "--set", f"run.folder={tmp_path}/a run"]) == 2


def test_printed_commands_can_be_pasted(config: Path, tmp_path: Path, cvmk: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "it's a $run; & more"
    assert main(["train", str(config), *SHORT, "--set", f'run.folder="{folder}"']) == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines() if " cvmk " in f" {line}"]
    words = [shlex.split(line) for line in printed]
    assert ["echo", "Good morning.", "|", "cvmk", "translate", f"{folder}/model"] in words
    assert ["cvmk", "validate", f"{folder}/model", "--source", "FILE", "--reference", "FILE"] in words


def test_an_interruption_prints_a_command_that_goes_on(config: Path, tmp_path: Path) -> None:
    """With the configuration in a pipe, which nobody can read again."""
    folder = tmp_path / "my runs" / "1"
    options = ["-", "--set", "training.iterations=100000", "--set", "validation.validate_every=100000", "--set", f"run.folder={folder}"]
    with subprocess.Popen(command("train", *options), stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        assert run.stdin and run.stderr
        run.stdin.write(config.read_text())
        run.stdin.close()
        while last_step(folder) < 0 and run.poll() is None:
            time.sleep(0.01)
        time.sleep(0.3)
        run.send_signal(2)
        told = run.stderr.read()
    assert run.returncode == 130
    (line,) = (line for line in told.splitlines() if "go on with" in line)
    _, _, printed = line.partition("go on with: cvmk ")
    assert shlex.split(printed) == ["train", f"{folder}/config.toml", "--resume"]
    done = subprocess.run(command(*shlex.split(printed), "--set", "training.iterations=1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_texts_of_any_compression_and_none_of_another_encoding(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (tmp_path / "train.tsv").read_bytes()
    (tmp_path / "packed").write_bytes(lzma.compress(text))
    (tmp_path / "wide").write_bytes(text.decode().encode("utf-16"))
    assert main(["train", str(config), *SHORT, "--set", "data.train.tsv=packed"]) == 0
    capsys.readouterr()
    assert main(["train", str(config), *SHORT, "--set", "data.train.tsv=wide", "--set", "data.on_bad_line=skip", "--restart"]) == 5
    assert f"{tmp_path}/wide is UTF-16 text: convert it to UTF-8" in (told := capsys.readouterr().err) and told.count("\n") == 1
