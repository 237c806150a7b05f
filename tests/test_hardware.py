from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy
from cvmk.hardware import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(3):
    numpy.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    numpy.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """80 MB are allocated, written and freed over and over: the pages are faulted in anew each time, or once."""

    def faults(choice: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, choice], capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100
    assert faults("leave") > 300


def test_it_is_harmless_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    from cvmk.hardware import keep_freed_memory

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    keep_freed_memory()
