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
    objects = sorted((native_build / "CMakeFiles/cvmk_cpu.dir/csrc").glob("*/cpu_*.o"))
    kernels = [path for path in objects if re.match(r"cpu_(avx2|avx512|amx)\.", path.name)]
    if objects and not kernels:
        pytest.skip("this processor or compiler has one level only")
    said = run("nm", "-A", "-C", *kernels)
    assert " T " in said  # the kernels are there
    assert [line for line in said.splitlines() if re.search(r" [WVu] ", line)] == []
