"""Files compiled for an instruction set share no symbol with others: at link time a weak one could win, and crash an older processor."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from native_tests import run


@pytest.mark.timeout(600)  # it may compile
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_no_weak_symbols(native_build: Path) -> None:
    folders = native_build / "CMakeFiles"
    objects = [*folders.glob("cvmk_cpu_*.dir/csrc/*/kernels.cpp.o"), *folders.glob("cvmk_cpu.dir/csrc/*/cpu_*.o")]
    kernels = [path for path in objects if re.search(r"_(avx2|avx512|amx)\.", str(path.relative_to(folders)))]
    if objects and not kernels:
        pytest.skip("this processor or compiler has one level only")
    said = run("nm", "-A", "-C", *kernels)
    assert re.search(r" [DR] cvmk::scan::at_avx512", said)  # the kernels are there
    assert [line for line in said.splitlines() if re.search(r" [WVu] ", line)] == []
