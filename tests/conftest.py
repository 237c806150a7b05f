from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["PYTHONSAFEPATH"] = "1"  # processes that tests start use the installed package, not the sources in the working directory
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported: without a GPU its kernels run on CPU tensors


@pytest.fixture(autouse=True)
def gradients_stay_on() -> Iterator[None]:
    """A check of torch's own (opcheck) that fails half-way leaves gradients off; hundreds of later tests would fail with it."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_grad_enabled(True)
