from __future__ import annotations

import math

import pytest
import torch

from cvmk.config import ScheduleConfig
from cvmk.config.optimizer import SCHEDULES
from cvmk.training.schedule import learning_rate_factor

KINDS = [kind for kind in SCHEDULES.options if kind != "one_cycle"]


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", [*KINDS, "one_cycle"])
def test_no_warmup_is_legal(kind: str) -> None:
    config = ScheduleConfig(kind=kind, warmup=0)  # type: ignore[arg-type]
    assert 0 < learning_rate_factor(config, 1, 10) <= 1


def test_linear_goes_straight_to_the_final_factor() -> None:
    config = ScheduleConfig(kind="linear", warmup=20, final_factor=0.2)
    assert [learning_rate_factor(config, step, 100) for step in (20, 40, 60, 100, 150)] == pytest.approx([1, 0.8, 0.6, 0.2, 0.2])


def test_one_cycle_is_that_of_pytorch() -> None:
    """Up in half a cosine, down in another; PyTorch counts from 0."""
    config = ScheduleConfig(kind="one_cycle", warmup=30, initial_factor=0.1, final_factor=0.002)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=101, pct_start=(30 + 1) / 101, div_factor=10, final_div_factor=50, cycle_momentum=False
    )
    theirs = []
    for _ in range(100):
        optimizer.step(), cycle.step()
        theirs.append(optimizer.param_groups[0]["lr"])
    assert [learning_rate_factor(config, step, 100) for step in range(1, 101)] == pytest.approx(theirs, rel=1e-9)


def test_warmup_stable_decay() -> None:
    straight = ScheduleConfig(kind="warmup_stable_decay", warmup=10, decay=0.25, decay_shape="linear", final_factor=0.0)
    assert [learning_rate_factor(straight, step, 200) for step in (5, 10, 149, 150, 175, 200, 300)] == pytest.approx([0.5, 1, 1, 1, 0.5, 0, 0])
    rooted = straight.model_copy(update={"decay_shape": "sqrt", "final_factor": 0.1})
    assert [learning_rate_factor(rooted, step, 200) for step in (150, 175, 200)] == pytest.approx([1, 1 - 0.9 * math.sqrt(0.5), 0.1])
    late = straight.model_copy(update={"warmup": 180})  # the way down begins where the way up ends
    assert [learning_rate_factor(late, step, 200) for step in (90, 180, 190, 200)] == pytest.approx([0.5, 1, 0.5, 0])
