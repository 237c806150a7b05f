"""The native unit tests of csrc/tests: they compile without a warning and pass."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="pybind11 is not installed, so CMake cannot configure the native library")
ROOT = Path(__file__).resolve().parents[2]
COMPILERS = ("c++", "g++", "clang++")

pytestmark = [
    pytest.mark.timeout(300),  # it compiles
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ctest") is None, reason="cmake or ctest is not installed"),
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler is installed"),
]


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("sanitize", ["", "-fsanitize=address,undefined -fno-sanitize-recover=all"], ids=["plain", "sanitized"])
def test_native_unit_tests(tmp_path: Path, sanitize: str):
    options = ["-DCVMK_TESTS=ON", "-DCVMK_WERROR=ON", "-DCVMK_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    if sanitize:
        probe = tmp_path / "probe.cpp"
        probe.write_text("int main() { return 0; }\n")
        compiler = next(filter(None, map(shutil.which, COMPILERS)))
        if subprocess.run([compiler, *sanitize.split(), str(probe), "-o", str(tmp_path / "probe")], capture_output=True, check=False).returncode != 0:
            pytest.skip("the compiler has no address and undefined-behaviour sanitizers")
        options.append(f"-DCMAKE_CXX_FLAGS={sanitize} -g1")
    build = str(tmp_path / "build")
    run("cmake", "-S", str(ROOT), "-B", build, *options)
    run("cmake", "--build", build, "--parallel", "2", "--target", "native_tests")
    said = run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in said
