"""`cvmk bench`: rows for every backend, JSON, and refusals."""

from __future__ import annotations

import json

import pytest
import torch

from cvmk import ops
from cvmk.cli import main


def test_rows_of_one_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--op", "selective_state_update", "--seconds", "0.01", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["backend"]: row for row in report["rows"]}
    assert {row["op"] for row in report["rows"]} == {"selective_state_update"}
    assert rows["reference"]["seconds"] > 0
    assert set(rows) == {row.backend for row in ops.backends_report()["selective_state_update"] if row.reasons != (f"{row.backend}: not written for this op",)}
    for row in rows.values():
        assert (row["seconds"] is None) == bool(row["reasons"])
    assert report["machine"]["packages"]["torch"] == torch.__version__


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--op", "selective_state_update", "--seconds", "0.01"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("selective_state_update: ")
    assert any(line.split()[0] == "reference" and line.endswith(" ms") for line in out[1:])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--op", "x"], "x"),
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--seconds", "inf"], "--seconds"),
        (["--device", "tpu!"], "tpu!"),
        (["--device", "meta"], "meta"),
    ],
)
def test_refusals(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["--tune"], ["--device", "cuda"]])
def test_gpu_is_asked_for(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith("cvmk: ")
