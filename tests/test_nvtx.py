"""Ranges for profilers: balanced where somebody listens, and next to nothing where nobody does."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from cvmk import nvtx


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would reach the profiler of a process that has one."""
    events: list[str] = []
    monkeypatch.setattr(nvtx, "LISTENING", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: events.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: events.append("end"))
    return events


def test_ranges_are_nested_and_end_with_an_error_too(recorded: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), nvtx.span("outer"):
        assert nvtx.spanned("inner", lambda a, b: a + b)(1, 2) == 3
        raise ZeroDivisionError
    assert recorded == ["cvmk: outer", "cvmk: inner", "end", "end"]


def test_without_cuda_nothing_is_called(recorded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with nvtx.span("x"):
        pass
    assert recorded == []


@pytest.mark.parametrize(
    "environment,listening",
    [({}, False), ({"NVTX_INJECTION64_PATH": "/tool.so"}, True), ({"CVMK_NVTX": "1"}, True), ({"CVMK_NVTX": "0", "NVTX_INJECTION64_PATH": "/tool.so"}, False)],
)
def test_who_listens_is_said_by_the_environment(environment: dict[str, str], listening: bool) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("CVMK_NVTX", "NVTX_INJECTION64_PATH")}
    code = "import sys; from cvmk import nvtx; print(nvtx.LISTENING, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(listening), "False"]


def test_free_where_nobody_listens() -> None:
    assert not nvtx.LISTENING and nvtx.span("a") is nvtx.span("b")

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(1000):
            with nvtx.span("x"):
                pass
        return (time.perf_counter() - start) / 1000

    assert min(seconds() for _ in range(20)) < 2e-6
