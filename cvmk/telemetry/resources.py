"""What the process and the machine use: from /proc and NVML, nothing to install. Elsewhere than on Linux much of it is None."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from cvmk.errors import CvmkError
from cvmk.telemetry.nvml import Gpus
from cvmk.telemetry.schema import Resources
from cvmk.telemetry.stream import EventStream

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class _Clocks(NamedTuple):
    """Seconds at one moment."""

    now: float
    process: float
    """Of processor, all threads together."""
    busy: float | None
    """Of all cores together that they were busy, and that they were there."""
    total: float | None


class Gauges:
    """Looks at the process and the machine. Shares are of the time since the last look, or since it was made."""

    def __init__(self) -> None:
        self._before = _clocks()
        self._gpus = Gpus()

    def read(self, step: int | None = None) -> Resources:
        """What is used now. Takes some tenths of a millisecond, a few with GPUs."""
        before, now = self._before, _clocks()
        self._before = now
        elapsed = now.now - before.now
        process = (now.process - before.process) / elapsed if elapsed > 0 else None
        machine = None
        if None not in (now.busy, now.total, before.busy, before.total) and (cores := now.total - before.total) > 0:  # type: ignore[operator]
            machine = min(max((now.busy - before.busy) / cores, 0.0), 1.0)  # type: ignore[operator]
        used, total = _machine_memory()
        return Resources(step, _rounded(process), _rounded(machine), _resident(), used, total, self._gpus.read())


class ResourceWatch:
    """Emits what `Gauges` read every so many seconds, from a thread of its own, and once more at the end. A context manager.

    step   asked for the iteration that training is at.
    """

    def __init__(self, events: EventStream, every: float, step: Callable[[], int | None] = lambda: None) -> None:
        self._events, self._every, self._step = events, every, step
        self._gauges = Gauges()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cvmk resources", daemon=True)

    def __enter__(self) -> ResourceWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(CvmkError):  # a log that cannot be written ends the run where it matters
            while not self._ended.wait(self._every):
                self._events.emit(self._gauges.read(self._step()))
            self._events.emit(self._gauges.read(self._step()))


def _clocks() -> _Clocks:
    busy = total = None
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/stat", encoding="ascii") as file:
        fields = [int(field) / _TICKS for field in file.readline().split()[1:9]]  # user nice system idle iowait irq softirq steal
        total = sum(fields)
        busy = total - fields[3] - fields[4]
    return _Clocks(time.monotonic(), time.process_time(), busy, total)


def _resident() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE
    return None


def _machine_memory() -> tuple[int | None, int | None]:
    """Bytes in use and in all."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError), open("/proc/meminfo", encoding="ascii") as file:
        lines = (line.split() for line in file)
        found = {words[0]: int(words[1]) * 1024 for words in lines if words[0] in ("MemTotal:", "MemAvailable:")}
        return found["MemTotal:"] - found["MemAvailable:"], found["MemTotal:"]
    return None, None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
