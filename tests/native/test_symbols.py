"""Files compiled for an instruction set share no symbol with others: at link time a weak one could win, and crash an older processor."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

OBJECTS = sorted(Path(__file__).resolve().parents[2].glob("build/*/CMakeFiles/cvmk_cpu.dir/csrc/*/cpu_*.o"))
KERNELS = [path for path in OBJECTS if re.match(r"cpu_(avx2|avx512|amx)\.", path.name)]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.skipif(not KERNELS, reason="no build folder here: install with pip from this checkout first")
def test_no_weak_symbols() -> None:
    said = subprocess.run(["nm", "-A", "-C", *map(str, KERNELS)], capture_output=True, text=True, check=True).stdout
    assert " T " in said  # the kernels are there
    assert [line for line in said.splitlines() if re.search(r" [WVu] ", line)] == []
