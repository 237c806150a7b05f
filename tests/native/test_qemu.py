"""Processors that have less than the one at hand, emulated: the library loads there, picks its level, and computes right.

Needs qemu-user (Debian: apt-get install qemu-user). With CVMK_REQUIRE_QEMU=1, as in continuous integration, its absence is a failure.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from native_tests import COMPILERS, run

import cvmk
from cvmk.ops import native

QEMU = shutil.which("qemu-x86_64")
TESTS = tuple(re.findall(r"^cvmk_test\((\w+)\)", (Path(__file__).parents[2] / "csrc" / "tests" / "CMakeLists.txt").read_text(), re.MULTILINE))
LEVELS = {"qemu64": "base", "Haswell": "avx2"}
pytestmark = [
    pytest.mark.timeout(600),  # it may compile
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the binaries under test are not of x86-64"),
]


@pytest.fixture(scope="session", autouse=True)
def emulator() -> None:
    if QEMU is None:
        assert os.environ.get("CVMK_REQUIRE_QEMU") != "1", "qemu-x86_64 is not installed: apt-get install qemu-user"
        pytest.skip("qemu-x86_64 is not installed (Debian's package is qemu-user)")


def emulated(cpu: str, *command: str | Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "CVMK_CPU_ISA"}
    return run(str(QEMU), "-cpu", cpu, *command, seconds=100, environment={**kept, "OMP_NUM_THREADS": "1", **environment})


@pytest.mark.parametrize("cpu", LEVELS)
@pytest.mark.parametrize("test", TESTS)
def test_native_unit_tests(native_build: Path, cpu: str, test: str):
    program = native_build / "csrc" / "tests" / f"test_{test}"
    if test == "cpu_features":
        assert emulated(cpu, program, "emulated") == f"level {LEVELS[cpu]}\n"
    else:
        emulated(cpu, program, CVMK_CPU_ISA=LEVELS[cpu])  # the levels below are emulated with lesser processors


def test_every_unit_test_is_emulated(native_build: Path):
    built = {path.name for path in (native_build / "csrc" / "tests").glob("test_*") if path.is_file() and os.access(path, os.X_OK)}
    assert built == {f"test_{name}" for name in TESTS}


@pytest.mark.skipif(native.library() is None, reason=f"no native library: {native.reason()}")
@pytest.mark.parametrize("cpu", LEVELS)
def test_python_module_loads(cpu: str):
    """Nothing that runs while the module loads needs more than the processor has. (torch and NumPy ask for more than qemu64.)"""
    code = "from cvmk.libraries import *; s = load('_native', 'native')[0].Sketch(9, True, 1); s.add_items(['a', b'a', 'b']); print(isa_level(), len(s))"
    folder = str(Path(cvmk.__file__).parents[1])
    assert emulated(cpu, sys.executable, "-P", "-c", code, PYTHONPATH=folder) == f"{LEVELS[cpu]} 2\n"


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler is installed")
def test_the_emulator_lacks_what_its_processor_lacks(tmp_path: Path):
    """Else the tests above would prove nothing."""
    source = "typedef int V __attribute__((vector_size(32))); int main(int n, char**) { volatile V v{n}; v = v + v; return v[0] - 2; }\n"
    (tmp_path / "wide.cpp").write_text(source)
    run(COMPILERS[0], "-O1", "-mavx2", tmp_path / "wide.cpp", "-o", tmp_path / "wide")
    emulated("Haswell", tmp_path / "wide")
    died = subprocess.run([str(QEMU), "-cpu", "qemu64", str(tmp_path / "wide")], capture_output=True, cwd=tmp_path, check=False)
    assert died.returncode == -signal.SIGILL
