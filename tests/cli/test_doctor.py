"""cvmk doctor: complete, truthful, and never the one that fails."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from typing import Any

import pytest
import torch
from runs import command

import cvmk
from cvmk import hardware, libraries, ops
from cvmk.cli import doctor, main


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return doctor.collect()


def test_json_is_one_object_with_everything(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["cvmk"] == cvmk.__version__ and answer["python"] == platform.python_version()
    assert answer["packages"]["torch"] == importlib.metadata.version("torch")
    assert answer["cpu"]["level"] in libraries.LEVELS and answer["cpu"]["threads"] >= 1
    assert answer["torch_devices"][0] == "cpu" and len(answer["torch_devices"]) == 1 + torch.cuda.device_count()
    assert set(ops.backends_report()) < set(answer["ops"]) and answer["error"] is None
    for rows in answer["ops"].values():
        assert any(row["backend"] == "reference" and row["available"] for row in rows)
        assert all(row["available"] or row["reasons"] for row in rows)


def test_lines_name_every_op_and_every_refusal(capsys: pytest.CaptureFixture[str], report: dict[str, Any]):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    for op, rows in report["ops"].items():
        assert f"  {op}: " in said
        for row in rows:
            for reason in row["reasons"]:
                assert f"not {reason}" in said


def test_a_library_that_is_missing_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(libraries, "load", lambda module, part: (None, f"no compiler for {part}"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "native: not available: no compiler for native" in said and "cuda: not available: no compiler for cuda" in said
    assert "gpus: none: nvidia-smi was not found" in said and "level of kernels: base" in said


def test_a_wrong_cap_is_told_in_the_report_and_by_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    if libraries.load("_native", "native")[0] is None:
        pytest.skip("without the native library nothing reads CVMK_CPU_ISA")
    monkeypatch.setenv("CVMK_CPU_ISA", "fastest")
    assert main(["doctor"]) == 2
    said = capsys.readouterr()
    assert "level of kernels: CVMK_CPU_ISA is 'fastest': set it to base, avx2, avx512 or amx" in said.out
    assert said.err == "cvmk: CVMK_CPU_ISA is 'fastest': set it to base, avx2, avx512 or amx, or unset it\n"
    monkeypatch.setenv("CVMK_CPU_ISA", "base")
    assert main(["doctor"]) == 0
    assert "level of kernels: base (detected: " in (said := capsys.readouterr().out) and "capped by CVMK_CPU_ISA=base" in said
    monkeypatch.setenv("CVMK_CPU_ISA", "base-avx512_vnni")
    assert main(["doctor"]) == 0
    assert "capped by CVMK_CPU_ISA=base-avx512_vnni" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [["doctor"], ["translate", "nowhere"]])
@pytest.mark.parametrize("setting", ["CVMK_BACKEND", "CVMK_CPU_ISA"])
def test_a_wrong_setting_ends_every_verb_with_a_sentence(verb: list[str], setting: str):
    if setting == "CVMK_CPU_ISA" and libraries.load("_native", "native")[0] is None:
        pytest.skip("without the native library nothing reads CVMK_CPU_ISA")
    done = subprocess.run(command(*verb), env={**os.environ, setting: "fastest"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"cvmk: {setting}") and "'fastest'" in done.stderr and done.stderr.count("\n") == 1
    assert ("versions" in done.stdout) == (verb == ["doctor"])


def test_settings_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("CVMK_BACKEND", "reference")
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["CVMK_BACKEND"] == "reference"
    assert main(["doctor"]) == 0
    assert "  CVMK_BACKEND: reference\n" in capsys.readouterr().out


def test_missing_extras_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda name: ["torch>=2.11", "no-such-package-of-ours>=1; extra == 'search'", 'numpy; extra == "bench"', "ray[default]; extra == 'ray'"],
    )
    found = doctor.extras()
    assert found["search"] == [{"package": "no-such-package-of-ours", "version": None, "install": "pip install 'cvmk[search]'"}]
    assert found["bench"] == [{"package": "numpy", "version": importlib.metadata.version("numpy"), "install": None}]
    assert found["ray"][0]["package"] == "ray" and set(found) == {"search", "bench", "ray"}


def test_a_broken_torch_is_an_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken() -> None:
        raise RuntimeError("libcudart is too old")

    monkeypatch.setattr(ops, "backends_report", broken)
    assert main(["doctor"]) == 0
    assert "RuntimeError: libcudart is too old" in capsys.readouterr().out


@pytest.fixture
def one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from cvmk.ops import _check

    monkeypatch.setattr(_check, "CASES", {"attention_kl": _check.CASES["attention_kl"]})


@pytest.mark.usefixtures("one_op")
def test_a_check_prints_a_row_each(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "attention_kl on cpu" and lines[-1].startswith("All ") and lines[-1].endswith(" checks passed on cpu.")
    forward = next(line for line in lines if "reference" in line and "float32, forward" in line)
    assert "error " in forward and " of " in forward and " ms " in forward and forward.endswith("right")
    assert any(line.split()[0] == "triton" and "not checked: " in line for line in lines)


@pytest.mark.usefixtures("one_op")
def test_a_check_as_json_holds_the_report_too(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--check", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["cvmk"] == cvmk.__version__ and "ops" in answer
    row = next(row for row in answer["checks"] if row["backend"] == "reference" and row["which"] == "gradient")
    assert row["op"] == "attention_kl" and row["passed"] is True and 0 < row["error"] <= row["tolerance"] and row["seconds"] > 0 and row["device"] == "cpu"
    assert {"case", "reasons"} < set(row)


@pytest.mark.usefixtures("one_op")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_wrong_kernel_ends_the_check_with_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]):
    from cvmk.ops import _check

    monkeypatch.setattr(_check, "_FACTORS", {"forward": -1e9, "gradient": 3})  # nothing is right enough
    assert main(["doctor", "--check", *options]) == 3
    said = capsys.readouterr()
    assert "reference attention_kl" in said.err and said.err.startswith("cvmk: ") and said.err.count("\n") == 1
    assert "WRONG" in said.out if not options else any(row["passed"] is False for row in json.loads(said.out)["checks"])


def test_a_check_in_an_environment_without_sense(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("CVMK_BACKEND", "fastest")
    assert main(["doctor", "--check"]) == 2
    assert capsys.readouterr().err.startswith("cvmk: CVMK_BACKEND names the backend 'fastest'")


class Answer:
    def __init__(self, returncode: int, stdout: str = "", stderr: str = "") -> None:
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


@pytest.mark.parametrize(
    ("answer", "devices", "reason"),
    [
        (
            Answer(0, "0, NVIDIA H200, 9.0, 143771\n1, Quadro, the old, 7.5, [N/A]\n"),
            [
                {"index": 0, "name": "NVIDIA H200", "capability": "9.0", "memory_bytes": 143771 * 2**20},
                {"index": 1, "name": "Quadro, the old", "capability": "7.5", "memory_bytes": None},
            ],
            None,
        ),
        (Answer(9, "", "NVIDIA-SMI has failed because it couldn't communicate with the driver\nmore\n"), [], "couldn't communicate with the driver"),
        (Answer(0, "No devices were found\n"), [], "shows no GPU"),
    ],
)
def test_gpus_as_nvidia_smi_tells_them(monkeypatch: pytest.MonkeyPatch, answer: Answer, devices: list[dict[str, Any]], reason: str | None):
    monkeypatch.setattr(libraries, "load", lambda module, part: (None, "not built"))
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("subprocess.run", lambda *arguments, **options: answer)
    found = hardware.gpus()
    assert found.devices == devices
    assert found.reason is None if reason is None else reason in str(found.reason)


def test_tables_on_a_terminal_hold_the_same_facts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], report: dict[str, Any]):
    monkeypatch.setenv("COLUMNS", "200")
    report = {**report, "extras": {"search": [{"package": "optuna", "version": None, "install": "pip install 'cvmk[search]'"}]}}
    monkeypatch.setattr(doctor, "collect", lambda: report)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert doctor.run(argparse.Namespace(json=False)) == 0
    said = capsys.readouterr().out
    assert "[search] optuna" in said and "missing: pip install 'cvmk[search]'" in said  # not swallowed as markup
    assert all(op in said for op in report["ops"])
