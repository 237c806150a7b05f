"""Gauges of the process, the machine and its GPUs."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import pytest

from cvmk.telemetry import EventStream, Gauges, ResourceWatch, RunLog, nvml, read_events
from cvmk.telemetry.nvml import Gpus
from cvmk.telemetry.schema import Resources

GIGABYTE = 1 << 30


class Library:
    """NVML with two GPUs, the second of which tells nothing but its name."""

    nvmlInit_v2 = staticmethod(lambda: 0)

    @staticmethod
    def nvmlDeviceGetCount_v2(count: Any) -> int:
        count._obj.value = 2
        return 0

    @staticmethod
    def nvmlDeviceGetHandleByIndex_v2(index: Any, device: Any) -> int:
        device._obj.value = index.value + 1
        return 0 if index.value < 2 else 2

    @staticmethod
    def nvmlDeviceGetHandleByUUID(name: Any, device: Any) -> int:
        device._obj.value = 2
        return 0 if name.value == b"GPU-two" else 2

    @staticmethod
    def nvmlDeviceGetName(device: Any, text: Any, length: Any) -> int:
        text.value = b"H200 number %d" % device.value
        return 0

    @staticmethod
    def nvmlDeviceGetUtilizationRates(device: Any, use: Any) -> int:
        use._obj.gpu = 75
        return 0 if device.value == 1 else 3

    @staticmethod
    def nvmlDeviceGetMemoryInfo(device: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.used = 140 * GIGABYTE, 3 * GIGABYTE
        return 0 if device.value == 1 else 3

    @staticmethod
    def nvmlDeviceGetPowerUsage(device: Any, watts: Any) -> int:
        watts._obj.value = 412_500
        return 0 if device.value == 1 else 3


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


FIRST = {"index": 0, "name": "H200 number 1", "use": 0.75, "memory": 3 * GIGABYTE, "memory_total": 140 * GIGABYTE, "watts": 412.5, "celsius": None}
NOTHING = {"use": None, "memory": None, "memory_total": None, "watts": None, "celsius": None}
SECOND = {"index": 1, "name": "H200 number 2", **NOTHING}


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [FIRST, SECOND]),
        ("0", [FIRST]),
        ("GPU-two,0", [{**SECOND, "index": 0}, {**FIRST, "index": 1}]),
        ("1,-1,0", [{**SECOND, "index": 0}]),
        ("", []),
    ],
)
def test_gpus_that_the_process_sees(visible: str | None, expected: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Gpus().read() == expected


def test_no_driver() -> None:
    assert Gpus("libnvidia-that-is-not-there.so").read() == []
    assert nvml._LIBRARY == "libnvidia-ml.so.1"


def test_the_process_and_the_machine() -> None:
    gauges = Gauges()
    block = bytearray(64 << 20)
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    found = gauges.read(7)
    assert found.step == 7
    assert found.process_cpu is not None and 0.1 < found.process_cpu < 64
    assert found.machine_cpu is not None and 0 < found.machine_cpu <= 1
    assert found.memory is not None and found.memory > len(block)
    assert found.machine_memory is not None and found.machine_memory_total is not None and found.memory < found.machine_memory_total
    assert 0 < found.machine_memory < found.machine_memory_total
    time.sleep(0.3)
    idle = gauges.read()
    assert idle.process_cpu is not None and idle.process_cpu < found.process_cpu and idle.step is None


def test_they_are_read_while_a_run_goes_on(tmp_path: Path) -> None:
    events = EventStream(RunLog(tmp_path))
    with ResourceWatch(events, 0.05, lambda: 3):
        deadline = time.monotonic() + 20
        while (tmp_path / "events.jsonl").read_text().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    with ResourceWatch(events, 3600.0):
        pass
    events.close()
    found = [record.event for record in read_events(tmp_path / "events.jsonl")[0]]
    assert len(found) >= 4 and all(isinstance(event, Resources) for event in found)
    assert isinstance(found[0], Resources) and found[0].step == 3
    assert isinstance(found[-1], Resources) and found[-1].step is None, "a run that is shorter than that has one, at its end"
