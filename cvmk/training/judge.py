"""What a validation means for the run: the best so far, an improvement, or a regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cvmk.config import GuardConfig
from cvmk.training.state import Progress
from cvmk.validation import DistillationValidator, ValidationResult
from cvmk.validation.metrics import LOWER_IS_BETTER

_LOSS_ROSE = 1.05
"""The average loss has risen when it is above this multiple of what it was: batches alone move it by a few per cent."""
_COLLAPSED = 0.5
_WORTH = 10.0
"""A score collapses from so many points at least to less than half: below them, beginners' scores jump by more than that."""


class Verdict(NamedTuple):
    best: bool
    """No validation before was better: this one's checkpoint is the best."""
    improved: bool
    """It is better by validation.min_delta at least: patience begins anew."""
    regression: str | None
    """Why training went wrong, in words."""


class Judge:
    """Tells a model that got worse from one whose score fell by chance.

    A score falls by chance, because the sentences are few, and it falls on its way: between two checkpoints of a healthy run, most of all
    in its early iterations, it may differ by more than the sentences explain. So a lower score only counts towards patience, unless all of
    this holds, which is a regression: the warm-up is over; there are `guard.min_sentences` sentences; the paired bootstrap (Koehn 2004)
    against the best validation's output says "worse"; and training itself went wrong, as the rise of its average loss says, or else the
    score has collapsed to less than half.
    """

    def __init__(self, validator: DistillationValidator, guard: GuardConfig, warmup: int) -> None:
        self._validator, self._guard, self._warmup = validator, guard, warmup

    def __call__(self, result: ValidationResult, before: ValidationResult | None, progress: Progress, loss: float | None) -> Verdict:
        """Judge `result`, which the validator has just given; `before` was the best one until then, `loss` is the average loss now."""
        reference = progress.reference if progress.reference is not None else None if before is None else before.value
        best = self._validator.best is result
        improved = self._validator.improves(result.value, reference)
        regression = None if best or before is None else self._regression(result, before, progress.best_loss, loss)
        return Verdict(best, improved, regression)

    def _regression(self, result: ValidationResult, best: ValidationResult, best_loss: float | None, loss: float | None) -> str | None:
        guard = self._guard
        if not guard.rollback_on_regression or result.step <= self._warmup or result.sentences < guard.min_sentences:
            return None
        rose = loss is not None and best_loss is not None and loss > _LOSS_ROSE * best_loss
        if not (rose or _collapsed(result, best)) or not self._validator.regressed(result, best):
            return None
        fell = f"{result.metric} went from {best.value:.2f} to {result.value:.2f}, outside the bootstrap interval"
        return f"{fell}, and the average loss from {best_loss:.4g} to {loss:.4g}" if rose else fell


def _collapsed(result: ValidationResult, best: ValidationResult) -> bool:
    if result.metric in LOWER_IS_BETTER:
        return best.value > 0 and result.value * _COLLAPSED > max(best.value, _WORTH)
    return best.value >= _WORTH and result.value < _COLLAPSED * best.value


def blindness(history: Sequence[ValidationResult]) -> str | None:
    """A sentence where the deciding metric told nothing at any of several validations, for it was 0, or no number, at all of them."""
    if len(history) < 2 or any(_tells(result.metric, result.value) for result in history):
        return None
    last = history[-1]
    others = [score.metric for score in last.scores if score.metric not in LOWER_IS_BETTER and _tells(score.metric, score.value)]
    remedy = f'set validation.metric = "{others[0]}"' if others else "no metric told more, look at the translations in hypotheses/"
    return (
        f'validation.metric = "{last.metric}" was {last.value:.2f} at all {len(history)} validations, '
        f"so it chose nothing and the latest of them counts as the best: {remedy}"
    )


def _tells(metric: str, value: float) -> bool:
    return math.isfinite(value) and (metric in LOWER_IS_BETTER or value > 0)
