"""What is flagged, and what is not: ordinary noise, a falling loss, small batches."""

from __future__ import annotations

import math
import random

import pytest

from cvmk.telemetry import AnomalyWatch
from cvmk.telemetry.anomalies import SETTLED, WINDOW, Window
from cvmk.telemetry.schema import Anomaly


def usual(watch: AnomalyWatch, count: int = 200, seed: int = 0) -> list[Anomaly]:
    """Iterations of a training that goes well: the loss falls, norms are log-normal, batches differ in size."""
    draw = random.Random(seed)
    found = []
    for step in range(1, count + 1):
        tokens = draw.randint(300, 1000)
        seconds = 0.01 + tokens * 1e-4 * draw.uniform(0.9, 1.3)
        loss = 3 + 6 * math.exp(-step / 60) + draw.gauss(0, 0.1)
        found += watch.look(step, loss, math.exp(draw.gauss(0, 0.3)), tokens, seconds, 1e-4)
    return found


def look(watch: AnomalyWatch, *, loss: float = 3.2, norm: float = 1.0, tokens: int = 600, seconds: float = 0.07, wait: float = 1e-4) -> dict[str, Anomaly]:
    return {anomaly.quantity: anomaly for anomaly in watch.look(1000, loss, norm, tokens, seconds, wait)}


def test_a_training_that_goes_well_has_none() -> None:
    found = [anomaly for seed in range(5) for anomaly in usual(AnomalyWatch(), 2000, seed)]
    assert len(found) <= 1 and all(anomaly.deviations is not None and anomaly.deviations < 6 for anomaly in found), found  # chance has outliers, too


@pytest.mark.parametrize(
    ("values", "quantity"),
    [
        ({"loss": 6.0}, "loss"),
        ({"loss": 0.5}, "loss"),
        ({"loss": math.nan}, "loss"),
        ({"norm": 30.0}, "gradient_norm"),
        ({"norm": 0.0}, "gradient_norm"),
        ({"norm": math.inf}, "gradient_norm"),
        ({"seconds": 0.3}, "throughput"),
        ({"seconds": 0.13, "wait": 0.06}, "data_wait"),
    ],
)
def test_what_is_extraordinary(values: dict[str, float], quantity: str) -> None:
    watch = AnomalyWatch()
    usual(watch)
    assert look(watch) == {}
    found = look(watch, **values)  # type: ignore[arg-type]
    assert list(found) == [quantity]
    assert found[quantity].step == 1000 and found[quantity].text()
    if quantity == "gradient_norm":
        assert 0.7 < found[quantity].usual < 1.4  # told as a norm, not as its logarithm
    assert look(watch) == {}, "one of them does not change what is usual"


def test_a_small_batch_is_not_slow() -> None:
    watch = AnomalyWatch()
    usual(watch)
    assert look(watch, tokens=10, seconds=0.012) == {}


def test_deviations_are_counted() -> None:
    strict, lax = AnomalyWatch(3.0), AnomalyWatch(20.0)
    for watch in (strict, lax):
        usual(watch, 1000)
    away = look(strict, loss=3.7)["loss"].deviations
    assert away is not None and 5 < away < 9  # 0.7 of a standard deviation of 0.1
    assert look(lax, loss=3.7) == {}


def test_what_lasts_becomes_the_usual() -> None:
    watch = AnomalyWatch()
    usual(watch)
    flagged = [bool(look(watch, seconds=0.3)) for _ in range(WINDOW)]
    assert all(flagged[: WINDOW // 4]) and not any(flagged[WINDOW // 2 + 1 :])


def test_nothing_is_judged_before_there_is_something_to_compare_with() -> None:
    watch = AnomalyWatch()
    usual(watch, 2 * SETTLED - 1)
    assert look(watch, loss=50.0, norm=1e3) == {}
    watch = AnomalyWatch()
    usual(watch, SETTLED - 1)
    assert look(watch, seconds=5.0, wait=3.0) == {}
    usual(watch)
    watch.reset()
    assert look(watch, loss=50.0) == {}
    found = look(watch, loss=math.nan)
    assert math.isnan(found["loss"].usual), "what is no number is none at any time"


def test_numbers_that_are_all_equal() -> None:
    watch = AnomalyWatch()
    for _ in range(300):
        assert look(watch) == {}
    assert look(watch, loss=3.2001) == {}
    assert list(look(watch, loss=3.4)) == ["loss"]


def test_the_window_against_a_sort() -> None:
    draw, window, values = random.Random(1), Window(20), []
    for _ in range(300):
        values.append(draw.choice([draw.random(), 0.5]))
        window.add(values[-1])
        last = sorted(values[-20:])
        assert window.median == last[len(last) // 2]
        assert window.deviation == (last[3 * len(last) // 4] - last[len(last) // 4]) / 1.349
