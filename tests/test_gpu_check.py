"""The GPU machine's one command, as far as it can be tested without one: steps that fail or hang, figures and targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu import check as gpu_check
from gpu import contestants
from gpu.contestants import Row


def _check(tmp_path: Path, minutes: float = 1.0) -> gpu_check.Check:
    return gpu_check.Check(tmp_path, None, True, time.monotonic() + 60 * minutes)


def test_a_step_that_fails_or_hangs_loses_nothing_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def python(code: str, limit: float = 30.0) -> Any:
        return lambda check: check.run("log", [sys.executable, "-c", code], limit).strip()

    steps = {
        "good": python("print(6 * 7)"),
        "bad": python("import sys; print('no such thing'); sys.exit(3)"),
        "hanging": python("print('begun', flush=True); import time; time.sleep(60)", 6.0),
        "broken": lambda check: 1 / 0,
        "last": python("print('done')"),
    }
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    check = _check(tmp_path)
    assert not gpu_check.perform(check, list(steps))
    found = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert {name: step["status"] for name, step in found.items()} == {
        "good": "passed", "bad": "failed", "hanging": "failed", "broken": "failed", "last": "passed",
    }  # fmt: skip
    assert found["good"]["detail"] == "42" and found["last"]["detail"] == "done"
    assert "exit code 3" in found["bad"]["detail"] and "no such thing" in found["bad"]["detail"]
    assert "stopped after 6 s" in found["hanging"]["detail"] and found["hanging"]["seconds"] < 20
    assert "ZeroDivisionError" in found["broken"]["detail"]


def test_no_step_begins_without_time(tmp_path: Path) -> None:
    with pytest.raises(gpu_check.Failed, match="no time left"):
        _check(tmp_path, 0.01).run("log", [sys.executable, "-c", ""], 30)


def test_usage_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "machine,nonsense"])
    with pytest.raises(SystemExit) as stop:
        gpu_check.main()
    assert stop.value.code == 2 and "nonsense" in capsys.readouterr().err


def test_the_command_works_from_anywhere(tmp_path: Path) -> None:
    command = [str(Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_check.sh"), "--dry-run", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([*command, "--only", "machine"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "machine" in done.stdout and "all steps passed" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out" / "gpu_check.json").read_text())["steps"]["machine"]["detail"]["packages"]["torch"]
    done = subprocess.run([*command, "--only", "nonsense"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nonsense" in done.stderr


def test_figures_and_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ms of ours for 1e12 operations: 500 TFLOP/s, half of the limit, three times the quicker peer's rate."""
    monkeypatch.setattr(contestants.torch.cuda, "is_available", lambda: True)
    targets = (("limit", 0.5), ("slow", 4.0), ("best peer", 4.0), ("host", 1e-5), ("not there", 1.0), ("picoseconds", 3.0))
    row = Row("op", "case", lambda: None, operations=1e12, rate=1e15, traffic=4.8e9, targets=targets, elements=1e9)
    result = {
        "seconds": {"cvmk triton": 2e-3, "cvmk cuda": 4e-3, "slow": 8e-3, "quick": 9e-3},
        "graph_seconds": {"quick": 6e-3},
        "host_seconds": {"cvmk triton": 2e-5},
    }
    found = contestants._judged(row, result)
    assert found["ours"] == "cvmk triton" and found["tflops"] == pytest.approx(500) and found["limit_share"] == pytest.approx(0.5)
    assert found["ratios"] == pytest.approx({"slow": 4.0, "quick": 3.0}) and found["picoseconds"] == pytest.approx(2.0)
    assert [target["met"] for target in found["targets"]] == [True, True, False, False, None, True]
    line = next(contestants.table([{"op": "op", "case": "case", "failed": {}, **result, **found}]))
    assert "500.0 TFLOP/s" in line and "BELOW (best peer 4)" in line and "quick 3.00x" in line


def test_a_contestant_that_fails_is_a_line() -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    row = Row("op", "case", lambda: None, {"peer": fails, "absent": "peer: ImportError: no module"})
    found = contestants.measure(row, 0.01)
    assert found["failed"] == {"peer": "RuntimeError: out of memory", "absent": "peer: ImportError: no module"}
    assert found["ours"] == "cvmk as chosen"
    row.ours = fails
    found = contestants.measure(row, 0.01)
    assert found["ours"] is None and "out of memory" in next(contestants.table([found]))
