from __future__ import annotations

import math

import pytest

from cvmk.config import ScheduleConfig
from cvmk.training.schedule import learning_rate_factor


@pytest.mark.parametrize("kind", ["cosine", "inverse_sqrt", "constant"])
def test_warmup_is_linear_and_ends_at_the_peak(kind: str) -> None:
    config = ScheduleConfig(kind=kind, warmup=10)  # type: ignore[arg-type]
    assert [learning_rate_factor(config, step, 100) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


def test_inverse_square_root() -> None:
    config = ScheduleConfig(kind="inverse_sqrt", warmup=100)
    assert learning_rate_factor(config, 400, 1000) == pytest.approx(0.5)


def test_cosine_ends_at_the_final_factor() -> None:
    config = ScheduleConfig(kind="cosine", warmup=0, final_factor=0.1)
    assert learning_rate_factor(config, 1000, 1000) == pytest.approx(0.1)
    assert learning_rate_factor(config, 500, 1000) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert learning_rate_factor(config, 2000, 1000) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["cosine", "inverse_sqrt", "constant"])
def test_no_warmup_is_legal(kind: str) -> None:
    config = ScheduleConfig(kind=kind, warmup=0)  # type: ignore[arg-type]
    assert 0 < learning_rate_factor(config, 1, 10) <= 1
