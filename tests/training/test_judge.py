"""A model that got worse, and a score that fell by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from cvmk.config import GuardConfig, ValidationConfig
from cvmk.training.judge import Judge, Verdict, blindness
from cvmk.training.state import Progress
from cvmk.validation import DistillationValidator, ValidationResult

SENTENCES = [f"the {name} stands beside the {other} house" for name in ("cat", "dog", "cow", "hen", "fox") for other in ("red", "old", "new", "big", "low")]
GOOD = SENTENCES
FAIR = [sentence.replace("beside", "near") for sentence in SENTENCES]
BAD = ["something else"] * len(SENTENCES)


class Run:
    """Validations of a run, each judged as the trainer does it."""

    def __init__(self, *, sentences: int = len(SENTENCES), warmup: int = 10, guard: dict[str, Any] | None = None, **validation: Any) -> None:
        config = ValidationConfig(**{"metric": "chrf", "metrics": ["chrf"], "bootstrap": 50, "max_sentences": sentences, **validation})
        self.validator = DistillationValidator(config, SENTENCES, SENTENCES)
        self.judge = Judge(self.validator, GuardConfig(**(guard or {})), warmup)
        self.progress = Progress()

    def validate(self, step: int, outputs: Sequence[str], loss: float | None = 1.0) -> Verdict:
        before = self.validator.best
        result = self.validator.run(lambda sources: list(outputs[: len(sources)]), step)
        verdict = self.judge(result, before, self.progress, loss)
        if verdict.best:
            self.progress.best_loss = loss
        if verdict.improved:
            self.progress.reference = result.value
        return verdict


def test_the_first_validation_is_the_best() -> None:
    assert Run().validate(20, BAD) == Verdict(best=True, improved=True, regression=None)


def test_a_lower_score_alone_is_no_regression() -> None:
    """It is worse beyond the sentences' noise, and that happens between the checkpoints of healthy runs."""
    run = Run()
    run.validate(20, GOOD, 2.0)
    verdict = run.validate(40, FAIR, 1.9)
    assert run.validator.regressed(run.validator.history[1], run.validator.history[0])
    assert verdict == Verdict(best=False, improved=False, regression=None)
    assert run.validate(60, FAIR, 2.05).regression is None, "batches alone move the average loss by so much"


def test_a_lower_score_and_a_higher_loss_are_a_regression() -> None:
    run = Run()
    run.validate(20, GOOD, 2.0)
    words = run.validate(40, FAIR, 2.5).regression
    assert words is not None and "chrf went from 100.00 to" in words and "outside the bootstrap interval, and the average loss from 2 to 2.5" in words


@pytest.mark.parametrize("loss", [0.5, None])
def test_a_collapse_is_a_regression_whatever_the_loss(loss: float | None) -> None:
    run = Run()
    run.validate(20, GOOD, 1.0)
    words = run.validate(40, BAD, loss).regression
    assert words is not None and words.endswith("outside the bootstrap interval")


def test_a_collapse_of_an_error_rate() -> None:
    run = Run(metric="ter", metrics=["ter"])
    run.validate(20, FAIR)
    assert run.validate(40, BAD).regression is not None
    assert run.validate(60, GOOD) == Verdict(best=True, improved=True, regression=None)


def test_beginners_scores_do_not_collapse() -> None:
    """Scores of a few points double and halve by luck: there is nothing yet to fall from."""
    run = Run(metric="bleu", metrics=["bleu"])
    run.validate(20, ["cat near the old house"] * len(SENTENCES), 9.0)
    assert 0 < run.validator.history[0].value < 10
    assert run.validate(40, BAD, 8.0).regression is None


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"warmup": 40}, 40),
        ({"sentences": 1}, 40),
        ({"sentences": 19}, 40),
        ({"guard": {"min_sentences": 26}}, 40),
        ({"guard": {"rollback_on_regression": False}}, 40),
    ],
)
def test_what_is_not_judged(options: dict[str, Any], step: int) -> None:
    run = Run(**options)
    run.validate(20, GOOD, 1.0)
    assert run.validate(step, BAD, 5.0) == Verdict(best=False, improved=False, regression=None)


def test_of_equal_scores_the_latest_is_the_best_and_no_improvement() -> None:
    run = Run()
    run.validate(20, FAIR)
    assert run.validate(40, FAIR) == Verdict(best=True, improved=False, regression=None)
    assert run.validator.best is not None and run.validator.best.step == 40


def test_the_best_is_the_best_whatever_counts_as_an_improvement() -> None:
    run = Run(min_delta=5.0)
    values = []
    for step, count in enumerate((20, 21, 22, 23, 24, 25), 1):  # so many good ones: the score grows by less than min_delta each time
        verdict = run.validate(20 * step, [*GOOD[:count], *BAD[count:]])
        assert verdict.best
        values.append((run.validator.history[-1].value, verdict.improved))
    assert values[1][0] - values[0][0] < 5 and not values[1][1]
    assert sum(improved for _, improved in values) >= 3, "small gains add up"


def test_what_is_no_number_is_never_the_best() -> None:
    run = Run()
    original = run.validator._judge

    def judge(step: int, outputs: Sequence[str], *rest: Any) -> ValidationResult:
        result = original(step, outputs, *rest)
        return result if outputs[0] else ValidationResult(**{**vars(result), "value": math.nan})

    run.validator._judge = judge  # type: ignore[method-assign]
    nothing = [""] * len(SENTENCES)
    assert run.validate(20, nothing).best
    assert run.validate(40, nothing).best and run.validator.best is run.validator.history[1]
    assert blindness(run.validator.history) is not None and "nan" in (blindness(run.validator.history) or "")
    assert run.validate(60, FAIR) == Verdict(best=True, improved=True, regression=None)
    assert run.validate(80, nothing) == Verdict(best=False, improved=False, regression=None)
    assert blindness(run.validator.history) is None


def test_a_metric_that_told_nothing() -> None:
    run = Run(metric="bleu", metrics=["bleu", "chrf", "ter"])
    run.validate(20, BAD)
    assert blindness(run.validator.history) is None, "there was nothing to choose between"
    nothing = ["somethin"] * len(SENTENCES)
    run = Run(metric="bleu", metrics=["bleu", "chrf", "ter"])
    run.validate(20, nothing)
    run.validate(40, nothing)
    assert (blindness(run.validator.history) or "").endswith('the latest of them counts as the best: set validation.metric = "chrf"')
    run.validate(60, FAIR)
    assert blindness(run.validator.history) is None
