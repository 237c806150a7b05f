from __future__ import annotations

import math

import pytest

from cvmk.config import GuardConfig
from cvmk.training.guard import DivergenceGuard


def settled(guard: DivergenceGuard) -> DivergenceGuard:
    for step in range(50):
        assert guard.check(5.0 - 0.01 * step, 1.0 + 0.1 * (step % 3)) is None
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_counts_at_once(value: float) -> None:
    assert "loss" in (DivergenceGuard(GuardConfig()).check(value, 1.0) or "")
    assert "gradient" in (DivergenceGuard(GuardConfig()).check(1.0, value) or "")


def test_explosion_counts_after_the_window() -> None:
    guard = settled(DivergenceGuard(GuardConfig(window=3, loss_factor=2.0)))
    assert [guard.check(20.0, 1.0) is None for _ in range(3)] == [True, True, False]


def test_a_spike_is_forgiven_and_does_not_move_the_average() -> None:
    guard = settled(DivergenceGuard(GuardConfig(window=3, loss_factor=2.0)))
    for _ in range(20):
        assert guard.check(1e6, 1.0) is None
        assert guard.check(1e6, 1.0) is None
        assert guard.check(4.5, 1.0) is None


def test_exploding_gradient() -> None:
    guard = settled(DivergenceGuard(GuardConfig(window=2, gradient_factor=10.0)))
    assert guard.check(4.5, 50.0) is None
    assert "gradient" in (guard.check(4.5, 50.0) or "")


def test_state_round_trip_and_reset() -> None:
    guard = settled(DivergenceGuard(GuardConfig(window=3, loss_factor=2.0)))
    guard.check(20.0, 1.0)
    other = DivergenceGuard(GuardConfig(window=3, loss_factor=2.0))
    other.load_state_dict(guard.state_dict())
    assert other.check(20.0, 1.0) is None
    assert other.check(20.0, 1.0) is not None
    other.reset()
    assert other.check(20.0, 1.0) is None
