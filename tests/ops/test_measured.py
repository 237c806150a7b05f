"""The first use of a backend on a kind of GPU where nobody has measured it warns, once, until a check has passed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cvmk
from cvmk import ops
from cvmk.cli import main
from cvmk.ops import _check, _measured, cuda
from cvmk.ops._op import OPS

KIND = "sm_99"


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The CPU passes for a GPU of a new kind, and CUDA's kd_loss and attention_kl for backends that run there; the record is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_measured, "device_class", lambda device: KIND)
    for name in ("kd_loss", "attention_kl"):
        op = OPS[name]
        op.backends = [replace(op.reference, name="cuda", devices=("cpu",)), op.reference]
    monkeypatch.setattr(_check, "CASES", {name: _check.CASES[name] for name in ("kd_loss", "attention_kl")})
    _measured.forget()
    yield tmp_path / "cvmk" / "checked.json"
    for name in ("kd_loss", "attention_kl"):
        OPS[name].backends = None
    _measured.forget()


def call(rows: int = 3) -> Any:
    return ops.kd_loss(torch.zeros(rows, 5), torch.ones(rows, 5), torch.zeros(rows, dtype=torch.int64))


def maps() -> Any:
    return ops.attention_kl(*[torch.zeros(1, 1, 2, 4) for _ in range(4)])


def said(*calls: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for each in calls:
            each()
    return [str(warning.message) for warning in caught if issubclass(warning.category, ops.UnmeasuredBackendWarning)]


def test_once_a_backend_and_kind_and_with_the_command() -> None:
    found = said(call, call, lambda: call(4), maps)
    assert len(found) == 1
    for word in ("cuda", KIND, "cvmk doctor --check", "CVMK_BACKEND=reference"):
        assert word in found[0]


def test_other_kinds_warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(said(call)) == 1
    monkeypatch.setattr(_measured, "device_class", lambda device: "sm_98")
    assert "sm_98" in said(lambda: call(7), maps)[0]


def test_plain_pytorch_and_kernels_of_the_cpu_never_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.use("reference"):
        assert said(call, maps) == []
    monkeypatch.undo()
    assert _measured.device_class(torch.device("cpu")) is None
    OPS["kd_loss"].forget_choices()
    assert said(call) == []


def test_a_call_of_a_known_kind_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said(call)
    monkeypatch.setattr("cvmk.ops._op.warn_where_unmeasured", lambda *arguments: pytest.fail("asked again"))
    call()


def test_a_result_in_the_repository_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MEASURED", {"kd_loss": frozenset({(9, 9)})})
    assert said(call) == []
    assert len(said(maps)) == 1, "measured is one op, not the whole backend"


def test_a_passed_check_is_remembered(gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(said(call)) == 1
    assert main(["doctor", "--check"]) == 0
    assert "checks passed" in capsys.readouterr().out
    assert json.loads(gpu.read_text())[KIND][cvmk.__version__]["cuda"] is True
    OPS["kd_loss"].forget_choices()
    assert said(call, maps) == []


def test_a_failed_check_is_remembered_too(gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.parent.mkdir()
    gpu.write_text(json.dumps({KIND: {cvmk.__version__: {"cuda": True}}, "sm_70": {"0.0.1": {"cuda": True}}}))
    forward = OPS["kd_loss"].reference.forward
    OPS["kd_loss"].backends = [replace(OPS["kd_loss"].reference, name="cuda", forward=lambda call: tuple(x * 2 for x in forward(call)))]
    OPS["kd_loss"].backends = [*OPS["kd_loss"].backends, replace(OPS["kd_loss"].backends[0], name="reference", forward=forward)]
    assert main(["doctor", "--check"]) == 3
    told = capsys.readouterr()
    assert "WRONG" in told.out or "error" in told.out
    assert told.err.startswith("cvmk: ") and "cuda kd_loss" in told.err and told.err.count("\n") == 1
    written = json.loads(gpu.read_text())
    assert written[KIND][cvmk.__version__]["cuda"] is False and written["sm_70"] == {"0.0.1": {"cuda": True}}
    OPS["kd_loss"].forget_choices()
    assert len(said(call)) == 1


@pytest.mark.parametrize("content", ["", "[]", '{"sm_99": 3}', f'{{"sm_99": {{"{cvmk.__version__}": 1}}}}', '{"sm_99": {"0.0.0": {"cuda": true}}}'])
def test_a_record_that_says_nothing_of_this_version(gpu: Path, content: str) -> None:
    gpu.parent.mkdir()
    gpu.write_text(content)
    _measured.forget()
    assert len(said(call)) == 1


def test_a_record_that_cannot_be_written_is_no_failure(gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.parent.write_text("a file in the folder's place")
    assert main(["doctor", "--check"]) == 0
    assert "is not remembered: cannot write" in capsys.readouterr().err
