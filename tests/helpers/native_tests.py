"""Commands on the native code: a build folder with its unit tests, and the run of a command that must succeed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = tuple(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))


def unit_tests_pass(build: Path) -> None:
    """ctest in a build folder; it fails where there are none, too."""
    assert "100% tests passed" in run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")


def run(*command: str | Path, seconds: float = 500, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=seconds, check=False, env=environment)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build_tests(folder: Path, *options: str, targets: tuple[str, ...] = ("native_tests",)) -> Path:
    """A build folder with the native library's unit tests (target "native_tests") or the module itself ("_native")."""
    pytest.importorskip("pybind11", reason="pybind11 is not installed, so CMake cannot configure the native library")
    if shutil.which("cmake") is None or not COMPILERS:
        pytest.skip("cmake or a C++ compiler is not installed")
    fixed = ("-DCVMK_TESTS=ON", "-DCVMK_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "-S", ROOT, "-B", folder, *fixed, *options)
    run("cmake", "--build", folder, "--parallel", "2", "--target", *targets, seconds=1500)
    return folder
