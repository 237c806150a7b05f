"""What events become: curves of some hundred bins, whatever the length, and counts."""

from __future__ import annotations

import math

import pytest
from run_folders import step, validation

from cvmk.report.history import BINS, BoundedCurve, History
from cvmk.telemetry.schema import Anomaly, Epoch, Event, Iterations, Note, Record, Resumed, Rollback, Start


def history(*events: Event, **options: float) -> History:
    return History.of([Record(1.0 + at, event) for at, event in enumerate(events)], **options)  # type: ignore[arg-type]


def test_a_long_curve_keeps_its_extremes_and_its_mean() -> None:
    curve, values = BoundedCurve(), [math.sin(at / 50) for at in range(20_000)]
    values[7_777] = 99.0
    for at, value in enumerate(values):
        assert curve.add(at + 1, value)
    assert BINS <= len(curve.bins) <= 2 * BINS
    assert sum(one.count for one in curve.bins) == len(values)
    assert (curve.bins[0].first, curve.bins[-1].last) == (1, 20_000)
    assert all(one.last < other.first for one, other in zip(curve.bins, curve.bins[1:], strict=False))
    peak = next(one for one in curve.bins if one.first <= 7_778 <= one.last)
    assert peak.high == 99.0 and peak.low < 1.01
    assert sum(one.mean * one.count for one in curve.bins) == pytest.approx(sum(values))


def test_what_is_no_number_is_counted_and_not_drawn() -> None:
    found = history(step(1), step(2, loss=math.nan), step(3, norm=math.inf))
    assert [one.last for one in found.curve("loss").bins] == [1, 3] and found.curve("loss").not_finite == 1
    assert found.curve("gradient_norm").not_finite == 1
    assert found.curve("nothing").bins == []


def test_iterations_and_the_step_of_the_same_are_one() -> None:
    rows = Iterations(1, [3.0, 2.0], [1e-3, 1e-3], [0.5, 5.0], [100, 100], [1.0, 1.0], [0.25, 0.15])
    found = history(rows, step(2, loss=2.0, norm=5.0), step(3, norm=0.1), warmup=1, clip_norm=1.0)
    assert [(one.last, one.mean) for one in found.curve("loss").bins] == [(1, 3.0), (2, 2.0), (3, 2.0)]
    assert (found.iterations, found.logged, found.clipped) == (3, 2, 1)
    assert found.data_wait / found.seconds == pytest.approx(0.2)


def test_iterations_that_a_resumed_run_does_again_replace_the_old_ones() -> None:
    found = history(step(1), step(2, loss=9.0), validation(2, 1.0), Resumed(1), step(2, loss=4.0), validation(2, 7.0))
    assert [one.mean for one in found.curve("loss").bins] == [2.0, 4.0]
    assert [one.mean for one in found.curve("validation/bleu").bins] == [7.0]
    assert found.counts["resumed"] == 1


def test_a_rollback_begins_another_pass() -> None:
    found = history(step(1), step(2, loss=50.0), Rollback(2, 1, "the loss is 50", 1), step(2, loss=1.0))
    assert [(one.last, one.mean, one.pass_) for one in found.curve("loss").bins] == [(1, 2.0, 0), (2, 50.0, 0), (2, 1.0, 1)]
    assert [one.mean for one in found.curve("loss").last_pass()] == [1.0]
    assert found.rollbacks[0].problem == "the loss is 50"


def test_thousands_of_rollbacks_stay_bounded() -> None:
    events: list[Event] = []
    for at in range(1, 3000):
        events += [step(at), Rollback(at, 0, "x", at)]
    found = history(*events)
    assert len(found.curve("loss").bins) <= 2 * BINS and found.counts["rollback"] == 2999 and len(found.rollbacks) <= 20


def test_validations_have_intervals_and_the_best_is_known() -> None:
    found = history(validation(10, 5.0), validation(20, 9.0), validation(30, 7.0, best=False))
    assert [(one.mean, one.low, one.high) for one in found.curve("validation/bleu").bins] == [(5, 4, 6), (9, 8, 10), (7, 6, 8)]
    assert found.best_validation is not None and found.best_validation.step == 20
    assert found.last_validation is not None and found.last_validation.step == 30


def test_a_score_that_is_no_number_has_no_point() -> None:
    found = history(validation(10, math.nan, low=math.nan, high=math.nan), validation(20, 9.0, low=math.nan))
    assert [(one.last, one.low) for one in found.curve("validation/bleu").bins] == [(20, 9.0)]


def test_anomalies_beyond_the_first_hundred_are_counted_by_their_epoch() -> None:
    few = [Anomaly(at, "loss", 9.0, 2.0, 6.0) for at in range(100)]
    found = history(*few, Epoch(1, 500, 500, 1, 1.0, 0.1, 2.0, {"loss": 130, "gradient_norm": 0}))
    assert found.anomalies["loss"] == 130 and found.anomalies["gradient_norm"] == 0


def test_a_note_is_kept_once() -> None:
    found = history(Start("student", 7, 100, 0, 100), Note("a"), Note("a"), *(Note(str(at)) for at in range(100)))
    assert found.notes[:2] == ["a", "0"] and len(found.notes) == 20 and found.parameters == 7
