"""What the tests of several ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from levels import LEVELS

from cvmk import ops
from cvmk.ops._op import forget_choices


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels of one level, with fresh memory that is full of NaN."""
    monkeypatch.setenv("CVMK_CPU_ISA", request.param)
    forget_choices()
    torch.use_deterministic_algorithms(True)
    with ops.use("native"):
        yield request.param
    torch.use_deterministic_algorithms(False)
