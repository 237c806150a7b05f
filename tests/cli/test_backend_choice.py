"""A choice of backends by CVMK_BACKEND that this machine or this call cannot have is one sentence that names the variable, on every verb."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import version1
from runs import command

TRAIN = """
[data]
embedded = "phrasebook"
phrasebook_pairs = 1000
[tokenizer]
kind = "fallback"
vocabulary = 300
[model]
d_model = 16
ffn = 16
heads = 2
encoder_layers = 1
decoder_layers = 1
[training]
iterations = 2
"""


def run(backend: str, *arguments: object, cwd: Path, text: str = "") -> tuple[int, str, str]:
    done = subprocess.run(command(*arguments), input=text, capture_output=True, text=True, cwd=cwd, env={**os.environ, "CVMK_BACKEND": backend})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("verb", ["translate", "validate", "train"])
def test_no_backend_is_one_sentence(tmp_path: Path, verb: str) -> None:
    """CUDA kernels take nothing on the CPU, whatever the machine has."""
    version1.write(tmp_path / "model")
    for name in ("source", "reference"):
        (tmp_path / name).write_text("a man\n")
    (tmp_path / "train.toml").write_text(TRAIN)
    arguments = {
        "translate": ("translate", "model"),
        "validate": ("validate", "model", "--source", "source", "--reference", "reference"),
        "train": ("train", "train.toml", "--set", "run.folder=run", "--set", "run.device=cpu"),
    }[verb]
    code, out, error = run("cuda", *arguments, cwd=tmp_path, text="a man\n")
    told = error.splitlines()[-1]
    assert code == 2 and "Traceback" not in error and told.startswith("cvmk: no backend takes this call of ")
    assert "CVMK_BACKEND allows only cuda (cuda: " in told and "unset it, or add a backend" in told
    if verb != "train":  # which tells its progress
        assert error.splitlines() == [told] and out == ""


@pytest.mark.parametrize("arguments", [("bench", "--op", "selective_state_update", "--seconds", "0.001"), ("doctor",)])
def test_verbs_that_answer_about_backends_go_on(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, out, error = run("cuda", *arguments, cwd=tmp_path)
    assert code == 0 and error == "" and "reference" in out


@pytest.mark.parametrize("arguments", [("translate", "model"), ("train", "train.toml", "--set", "run.folder=run"), ("bench", "--op", "kd_loss")])
def test_no_such_backend(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    version1.write(tmp_path / "model")
    (tmp_path / "train.toml").write_text(TRAIN)
    code, out, error = run("warp", *arguments, cwd=tmp_path, text="a man\n")
    assert (code, out) == (2, "") and error == "cvmk: CVMK_BACKEND names the backend 'warp'; the backends are cuda, triton, native, reference\n"
