from __future__ import annotations

import zlib
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SHORT = 4
"""Of so many cases of a test one is short where kernels are interpreted, which takes a thousand times as long as a GPU; the others are exhaustive."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first case of each test is always among the short ones; the others are drawn by their names, so that all options are mixed."""
    from cvmk.ops.triton import INTERPRETED

    if not INTERPRETED:
        return
    seen = set()
    for item in items:
        if Path(__file__).parent not in item.path.parents or not isinstance(item, pytest.Function):
            continue
        test = item.path, item.originalname
        if test in seen and zlib.crc32(item.name.encode()) % SHORT:
            item.add_marker("exhaustive")
        seen.add(test)
