from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def multi30k() -> Path:
    """The Multi30k folder: CVMK_MULTI30K, or ../shared/data/multi30k beside the project."""
    folder = Path(os.environ.get("CVMK_MULTI30K") or Path(__file__).parents[2].parent / "shared" / "data" / "multi30k")
    if not folder.is_dir():
        pytest.skip(f"Multi30k is not at {folder}; set CVMK_MULTI30K to its folder")
    return folder
