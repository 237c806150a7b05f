"""The native unit tests of csrc/tests, which run at every instruction-set level of this machine: they compile without a warning and pass."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from native_tests import COMPILERS, build_tests, run, unit_tests_pass

pytestmark = [
    pytest.mark.timeout(1800),  # it compiles
    pytest.mark.skipif(shutil.which("ctest") is None, reason="ctest is not installed"),
]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"
THREADS = "-fsanitize=thread"


def sanitizer(folder: Path, flags: str) -> None:
    """Skips where the compiler has no such sanitizer."""
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    probe = [*COMPILERS[:1], *flags.split(), str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    if COMPILERS and subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"the compiler has no {flags.split()[0]}")


def test_as_shipped(native_build: Path):
    unit_tests_pass(native_build)


@pytest.mark.exhaustive
def test_sanitized(tmp_path: Path):
    sanitizer(tmp_path, SANITIZE)
    # What -Og leaves of the kernels is built in half the time of -O3.
    unit_tests_pass(build_tests(tmp_path / "build", "-DCVMK_KERNEL_OPTIMISATION=-Og", f"-DCMAKE_CXX_FLAGS={SANITIZE} -g1"))


@pytest.mark.exhaustive
def test_the_engine_has_no_data_races(tmp_path: Path):
    """The engine's threads are its own; those of OpenMP, whose library the sanitizer does not know, are not in it."""
    sanitizer(tmp_path, THREADS)
    build = build_tests(tmp_path / "build", "-DCVMK_KERNEL_OPTIMISATION=-Og", f"-DCMAKE_CXX_FLAGS={THREADS} -g1", targets=("test_engine",))
    run(build / "csrc" / "tests" / "test_engine")
