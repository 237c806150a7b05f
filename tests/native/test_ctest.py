"""The native unit tests of csrc/tests, which run at every instruction-set level of this machine: they compile without a warning and pass."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from native_tests import COMPILERS, build_tests, unit_tests_pass

pytestmark = [
    pytest.mark.timeout(1800),  # it compiles
    pytest.mark.skipif(shutil.which("ctest") is None, reason="ctest is not installed"),
]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"


def test_as_shipped(native_build: Path):
    unit_tests_pass(native_build)


@pytest.mark.exhaustive
def test_sanitized(tmp_path: Path):
    (tmp_path / "probe.cpp").write_text("int main() { return 0; }\n")
    probe = [*COMPILERS[:1], *SANITIZE.split(), str(tmp_path / "probe.cpp"), "-o", str(tmp_path / "probe")]
    if COMPILERS and subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("the compiler has no address and undefined-behaviour sanitizers")
    # What -Og leaves of the kernels is built in half the time of -O3.
    unit_tests_pass(build_tests(tmp_path / "build", "-DCVMK_KERNEL_OPTIMISATION=-Og", f"-DCMAKE_CXX_FLAGS={SANITIZE} -g1"))
