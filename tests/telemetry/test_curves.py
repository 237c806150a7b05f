"""Curves over the iterations, from events of any age."""

from __future__ import annotations

import math

from cvmk.telemetry import Curves, Record
from cvmk.telemetry.schema import Epoch, Event, Iterations, Resources, Resumed, Rollback, Start, Step, Validation


def curves(*events: Event) -> Curves:
    return Curves(Record(float(number), event) for number, event in enumerate(events))


def iterations(first: int, *losses: float) -> Iterations:
    count = len(losses)
    return Iterations(first, list(losses), [0.1] * count, [1.0] * count, [100] * count, [0.5] * count, [0.1] * count)


def test_iterations_one_by_one() -> None:
    found = curves(Start("m", 1, 1, 0), iterations(1, 5.0, 4.0), Step(2, 0.1, 1.0, 7.0, 4.0, 3.0, 1.0), iterations(3, 3.0)).series
    assert found["loss"].steps == [1, 2, 3] and found["loss"].values == [5.0, 4.0, 3.0] and found["loss"].times == [1.0, 1.0, 3.0]
    assert found["tokens_per_second"].values == [200.0] * 3  # not the average that `Step` has
    assert found["loss/logits"].values == [1.0] and "loss/hidden" not in found
    assert found["seconds"].values == [0.5] * 3 and found["data_wait"].values == [0.1] * 3


def test_a_run_of_before_has_what_it_logged() -> None:
    found = curves(Start("m", 1, 1, 0), Step(10, 0.1, 1.0, 7.0, 4.0), Step(20, 0.1, 1.0, 8.0, math.nan)).series
    assert found["loss"].steps == [10, 20] and found["tokens_per_second"].values == [7.0, 8.0] and math.isnan(found["loss"].values[1])


def test_what_was_undone_is_forgotten() -> None:
    found = curves(iterations(1, 5.0, 4.0, 9.0), Rollback(3, 2, "x", 1), iterations(3, 3.0), Resumed(1), iterations(2, 2.0))
    assert found.series["loss"].steps == [1, 2] and found.series["loss"].values == [5.0, 2.0]


def test_scores_and_resources() -> None:
    scores = [{"metric": "bleu", "value": 12.0}, {"metric": "chrf", "value": None}]
    gpus = [{"index": 1, "use": 0.5, "memory": 10, "name": "x"}]
    found = curves(
        Validation(10, "bleu", 12.0, 10.0, 14.0, 0.95, scores, scores[:1], 20, 0.1, None),
        Resources(10, 1.5, None, 100, 200, 400, gpus),
        Epoch(1, 10, 10, 100, 5.0, 0.1, 3.0, {"loss": 2, "data_wait": 1}),
    ).series
    assert {name: curve.values for name, curve in found.items()} == {
        "validation/bleu": [12.0], "agreement/bleu": [12.0], "process/cpu": [1.5], "process/memory": [100], "machine/memory": [200],
        "gpu1/use": [0.5], "gpu1/memory": [10], "epoch/loss": [3.0], "epoch/anomalies": [3],
    }  # fmt: skip
