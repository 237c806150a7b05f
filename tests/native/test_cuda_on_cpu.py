"""The header that runs CUDA kernels on the CPU for their tests: what it does, and the mistakes that it must find."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cuda_on_cpu
import pytest

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler is installed")]


@pytest.mark.parametrize("sanitize", ["", "-fsanitize=address,undefined -fno-sanitize-recover=undefined"], ids=["plain", "sanitized"])
def test_the_header(tmp_path: Path, sanitize: str) -> None:
    assert cuda_on_cpu.COMPILER is not None
    flags = [*cuda_on_cpu.FLAGS, *sanitize.split(), f"-I{cuda_on_cpu.CSRC / 'tests' / 'cuda'}", f"-I{cuda_on_cpu.CSRC}"]
    source, program = cuda_on_cpu.CSRC / "tests" / "cuda" / "test_on_cpu.cpp", tmp_path / "test_on_cpu"
    built = subprocess.run([cuda_on_cpu.COMPILER, *flags, str(source), "-o", str(program)], capture_output=True, text=True)
    if sanitize and "cannot find" in built.stderr:
        pytest.skip("the compiler has no address sanitizer")
    assert built.returncode == 0, built.stderr
    # Threads that an error leaves where they are keep what they own.
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode == 0, done.stderr
