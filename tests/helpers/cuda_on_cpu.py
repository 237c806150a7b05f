"""Builds the kernels of the CUDA library for the CPU (csrc/tests/cuda/on_cpu.h) and lets the CUDA backends run them on CPU tensors.

`build(folder)` compiles what changed and loads the module; `running(module)` puts it behind every op's CUDA backend. Nothing of this
needs a GPU or the CUDA toolkit.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cvmk.ops import _op, cuda

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]  # pybind11 has one where it is sanitised


def sources() -> list[Path]:
    """Every kernel, the bindings of its folder, and the module that holds them."""
    return [*sorted(CSRC.glob("*/cuda_*.cu")), CSRC / "tests" / "cuda" / "module.cpp"]


def build(folder: Path, flags: Sequence[str] = ()) -> ModuleType:
    """Compile into `folder` (kept: only what changed is compiled again) and load. Skips the test where there is no compiler or no pybind11."""
    if COMPILER is None:
        pytest.skip("no C++ compiler is installed")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    command = [COMPILER, *FLAGS, *flags, *(f"-I{path}" for path in (CSRC / "tests" / "cuda", CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]))]
    headers = sorted([*CSRC.glob("*/*.h"), *CSRC.glob("*/*.cuh"), *CSRC.glob("tests/cuda/*.h")])
    known = hashlib.sha256(" ".join(command).encode() + b"".join(path.read_bytes() for path in headers)).hexdigest()

    def compiled(source: Path) -> Path:
        name = hashlib.sha256(known.encode() + str(source).encode() + source.read_bytes()).hexdigest()[:20]
        made = folder / f"{source.stem}-{name}.o"
        if not made.exists():
            _run([*command, "-x", "c++", "-c", str(source), "-o", f"{made}.{os.getpid()}"])
            Path(f"{made}.{os.getpid()}").rename(made)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources()))
    name = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:20]
    library = folder / f"_cuda_on_cpu-{name}.so"
    if not library.exists():
        _run([COMPILER, *flags, "-shared", *map(str, objects), "-o", f"{library}.{os.getpid()}"])
        Path(f"{library}.{os.getpid()}").rename(library)
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@contextlib.contextmanager
def running(module: ModuleType) -> Iterator[None]:
    """While the block runs, `ops.use("cuda")` runs `module` on CPU tensors."""
    before = cuda.library, cuda.place, {name: op._backends for name, op in _op.OPS.items()}
    cuda.library, cuda.place = lambda: module, lambda tensor: (0, 0)  # type: ignore[assignment]
    for op in _op.OPS.values():
        op._backends = [replace(b, devices=("cpu",), unavailable=None) if b.name == "cuda" else b for b in op.backends]
        op.forget_choices()
    try:
        yield
    finally:
        cuda.library, cuda.place = before[:2]
        for name, op in _op.OPS.items():
            op._backends = before[2][name]
            op.forget_choices()


def orders(module: ModuleType) -> Iterator[int]:
    """The orders in which the threads of a block can run: ascending, descending, shuffled."""
    try:
        for order in range(3):
            module.set_order(order)
            yield order
    finally:
        module.set_order(0)


DEVICE = torch.device("cuda" if torch.cuda.is_available() and cuda.reason() is None else "cpu")
