from __future__ import annotations

import pytest
from mixer_models import Make, make_model
from recurrent_mixer import RunningMixer

from cvmk.nn import MIXERS


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make_model`, where the mixer "running" is known."""
    monkeypatch.setitem(MIXERS, "running", RunningMixer)
    return make_model
