"""What this machine offers: instruction sets, processors, GPUs. Asks the native libraries and the driver, never torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

from cvmk import libraries
from cvmk.errors import ConfigError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


@dataclass(frozen=True)
class Cpu:
    """The processor as kernels see it.

    features   instruction sets by name that the processor has and the operating system saves; empty without the native library
    emulated   those of them that a build for tests computes with others (CVMK_EMULATE_AMX=ON); empty in every other build
    detected   the highest level that these allow ("base", "avx2", "avx512", "amx"); None without the native library
    cap        the value of CVMK_CPU_ISA, or None
    level      the level that kernels use; None where `error` says why there is none
    threads    processors that this process may run on
    """

    features: dict[str, bool]
    emulated: list[str]
    detected: str | None
    cap: str | None
    level: str | None
    error: str | None
    threads: int


@dataclass(frozen=True)
class Gpus:
    """The GPUs that the driver shows: `index`, `name`, `capability` ("9.0"), `memory_bytes` each; `reason` says why there is none."""

    devices: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None


def cpu() -> Cpu:
    """The instruction sets and the dispatch level. Never raises: a wrong CVMK_CPU_ISA is told in `error`."""
    library, _ = libraries.load("_native", "native")
    level, error = None, None
    try:
        level = libraries.isa_level()
    except ConfigError as wrong:
        error = str(wrong)
    features = library.cpu_features() if library is not None else {}
    return Cpu(
        features=features,
        emulated=[name for name, there in features.items() if there and name.startswith("amx")] if library is not None and library.emulates_amx() else [],
        detected=library.detected_level() if library is not None else None,
        cap=os.environ.get("CVMK_CPU_ISA") or None,
        level=level,
        error=error,
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def keep_freed_memory() -> None:
    """Let this process keep large blocks that it frees, for the next tensors of that size; elsewhere than with glibc nothing happens.

    By default glibc gives blocks beyond some 100 KB back to the system at once, and every new tensor's pages are then faulted in anew.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Give the system back what this process has freed, as far as its C library can; some milliseconds."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def gpus() -> Gpus:
    """The NVIDIA GPUs, from the CUDA library of cvmk where it was built, else from nvidia-smi."""
    library, _ = libraries.load("_native_cuda", "cuda")
    if library is not None:
        devices = library.devices()
        return Gpus(devices, None if devices else library.device_error())
    command = shutil.which("nvidia-smi")
    if command is None:
        return Gpus(reason="nvidia-smi was not found")
    query = [command, "--query-gpu=index,name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Gpus(reason=f"nvidia-smi does not answer: {error}")
    if answer.returncode != 0:
        said = (answer.stderr + answer.stdout).strip().splitlines()
        return Gpus(reason=f"nvidia-smi failed: {said[0] if said else f'exit code {answer.returncode}'}")
    devices = [_parsed(line) for line in answer.stdout.splitlines() if line.count(",") >= 3]
    return Gpus(devices, None if devices else "nvidia-smi shows no GPU")


def _parsed(line: str) -> dict[str, Any]:
    index, rest = line.split(",", 1)
    name, capability, memory = (part.strip() for part in rest.rsplit(",", 2))
    return {"index": int(index), "name": name, "capability": capability, "memory_bytes": int(memory) * 2**20 if memory.isdigit() else None}
