"""Scores of runs on their validation and test sets with intervals, and what is significant between them, their baseline and their teachers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from cvmk.errors import CvmkError
from cvmk.report.evaluations import SETS, Evaluation
from cvmk.report.run import Run, pick
from cvmk.validation.bootstrap import PairedResult, interval_of, paired_of
from cvmk.validation.metrics import METRICS, Measurement, Score, display_name, good_direction, measure
from cvmk.validation.tokenization import Tokenization, tokenization

_RECORDED_ONLY = frozenset({"bertscore"})
"""Metrics that are not computed anew, for that takes a model."""
_SAME = 0.005


@dataclass(frozen=True)
class ScoreFigure:
    """A score with its confidence interval, as far as that is known."""

    metric: str
    value: float | None
    """None where it is no number."""
    low: float | None
    high: float | None
    signature: str
    label: str


@dataclass(frozen=True)
class Comparison:
    """A system against another one on the same sentences: paired bootstraps, or why there are none."""

    other: str
    pairs: tuple[PairedResult, ...] = ()
    reason: str = ""

    def pair(self, metric: str) -> PairedResult | None:
        return next((pair for pair in self.pairs if pair.metric == metric), None)


@dataclass
class SetScores:
    """A system (a run, or a teacher) on a set."""

    system: str
    set: str
    sentences: int | None
    scores: list[ScoreFigure]
    baseline: Comparison | None = None
    teacher: Comparison | None = None
    agreement: list[ScoreFigure] = field(default_factory=list)
    """Against the teacher's translations in place of the references."""
    notes: list[str] = field(default_factory=list)
    is_teacher: bool = False

    @property
    def metric(self) -> str | None:
        """The one that comes first: it decides."""
        return self.scores[0].metric if self.scores else None

    def score(self, metric: str | None) -> ScoreFigure | None:
        return next((score for score in self.scores if score.metric == metric), None)


def verdict(pair: PairedResult) -> str:
    """"better", "worse", or "no significant difference": whether the interval of the difference leaves out "equally good"."""
    if pair.worse:
        return "worse"
    return "better" if (pair.low > 0 if good_direction(pair.metric) > 0 else pair.high < 0) else "no significant difference"


def compare(runs: Sequence[Run], baseline: Run | None, samples: int, confidence: float, as_recorded: Collection[str] = ()) -> list[SetScores]:
    """The scores of every run on every set, then those of its teacher where they are known by sentence; metrics of `as_recorded` are not computed anew."""
    scorer = _Scorer(samples, confidence, as_recorded)
    found: list[SetScores] = []
    for name in SETS:
        taught = {run.evaluations[name].hypotheses: run.name for run in runs if name in run.evaluations}  # a teacher may be one of the runs
        teachers: list[SetScores] = []
        for run in runs:
            scores = scorer.run(run, name, baseline)
            if scores is None:
                continue
            found.append(scores)
            evaluation = run.evaluations.get(name)
            if evaluation is not None and evaluation.teacher is not None:
                known = taught.setdefault(evaluation.teacher, f"teacher of {run.name}")
                if known == f"teacher of {run.name}":
                    teachers.append(scorer.teacher(run, name, evaluation, known))
                scores.teacher = scorer.compared(run, evaluation.hypotheses, evaluation.teacher, evaluation, known)
        found += teachers
    return found


class _Scorer:
    def __init__(self, samples: int, confidence: float, as_recorded: Collection[str]) -> None:
        self._samples, self._confidence, self._as_recorded = samples, confidence, as_recorded
        self._measure = cache(measure)

    def run(self, run: Run, name: str, baseline: Run | None) -> SetScores | None:
        """None where the run was not scored on the set."""
        recorded, evaluation = run.recorded(name), run.evaluations.get(name)
        if not recorded and evaluation is None:
            return None
        scores = SetScores(run.name, name, _count(recorded.get("sentences")), _recorded(recorded, "scores"), agreement=_recorded(recorded, "agreement"))
        if evaluation is None:
            if run.missing.get(name):
                scores.notes.append(run.missing[name])
        else:
            scores.sentences = evaluation.sentences
            kept = len(evaluation.sources)
            if kept < evaluation.sentences:
                scores.notes.append(f"{run.name}: intervals and comparisons are of the first {kept} of {evaluation.sentences} {name} sentences")
            self._rescore(run, scores, evaluation, whole=kept == evaluation.sentences)
            if left := [score.label for score in scores.scores if score.metric in self._as_recorded]:
                scores.notes.append(f"{run.name}: {', '.join(left)} as recorded, for an interval takes long to compute: cvmk report {run.path} does")
        if baseline is not None and baseline is not run and (baseline.recorded(name) or name in baseline.evaluations):
            scores.baseline = self._against(run, name, baseline)
        return scores

    def teacher(self, run: Run, name: str, evaluation: Evaluation, label: str) -> SetScores:
        assert evaluation.teacher is not None
        scores = SetScores(label, name, len(evaluation.sources), [], is_teacher=True)
        scores.scores = [self._figure(measurement) for measurement in self._measured(run, evaluation.teacher, evaluation, scores.notes)]
        return scores

    def compared(self, run: Run, ours: tuple[str, ...], theirs: tuple[str, ...], evaluation: Evaluation, other: str) -> Comparison:
        """Paired bootstraps of two systems on the sentences of `evaluation`, by the metrics of `run`."""
        notes: list[str] = []
        both = [self._measured(run, texts, evaluation, notes) for texts in (ours, theirs)]
        if notes:
            return Comparison(other, reason=notes[0])
        pairs = [paired_of(a, b, self._samples, self._confidence) for a, b in zip(*both, strict=True)]
        return Comparison(other, tuple(pair for pair in pairs if math.isfinite(pair.difference)))

    def _against(self, run: Run, name: str, baseline: Run) -> Comparison:
        ours, theirs = run.evaluations.get(name), baseline.evaluations.get(name)
        for one, evaluation in ((run, ours), (baseline, theirs)):
            if evaluation is None:
                return Comparison(baseline.name, reason=one.missing.get(name) or f"{one.name} was not scored on a {name} set")
        assert ours is not None and theirs is not None
        if not ours.same_set(theirs):
            counts = f" ({ours.sentences} and {theirs.sentences} sentences)" if ours.sentences != theirs.sentences else ""
            reason = f"{run.name} and {baseline.name} were scored on different {name} sets{counts}"
            return Comparison(baseline.name, reason=f"{reason}: no significance, and their scores are not comparable")
        return self.compared(run, ours.hypotheses, theirs.hypotheses, ours, baseline.name)

    def _rescore(self, run: Run, scores: SetScores, evaluation: Evaluation, *, whole: bool) -> None:
        """Give every score its interval; one that comes out otherwise than recorded is told."""
        before = {score.metric: score for score in scores.scores}
        figures = [self._figure(measurement) for measurement in self._measured(run, evaluation.hypotheses, evaluation, scores.notes)]
        for now in figures if whole else ():
            then = before.get(now.metric)
            if then is None or then.value is None or now.value is None or abs(then.value - now.value) <= _SAME:
                continue
            by = f" (by {then.signature}; now {now.signature})" if then.signature != now.signature else ""
            scores.notes.append(f"{run.name} recorded {now.label} {then.value:.2f}{by}, its translations score {now.value:.2f}")
        anew = {score.metric: score for score in figures}
        order = dict.fromkeys([*before, *anew])
        scores.scores = [anew.get(metric) or before[metric] for metric in order]

    def _measured(self, run: Run, texts: tuple[str, ...], evaluation: Evaluation, notes: list[str]) -> list[Measurement]:
        """By the metrics of the run's validation. What keeps them from being computed becomes a note."""
        wanted = [run.setting("validation.metric", "bleu"), *run.setting("validation.metrics", [])]
        metrics = dict.fromkeys(metric for metric in wanted if isinstance(metric, str) and metric not in self._as_recorded)
        try:
            words = self._words(run, evaluation)
            return [self._measure(metric, texts, evaluation.references, words) for metric in metrics if metric in METRICS and metric not in _RECORDED_ONLY]
        except CvmkError as error:
            notes.append(f"{run.name} cannot be scored anew: {error}")
            return []

    @staticmethod
    def _words(run: Run, evaluation: Evaluation) -> Tokenization:
        language = run.setting("data.target_language", "") or ("de" if run.setting("data.embedded") else None)
        return tokenization(language, evaluation.references, run.setting("validation.bleu_tokenize", "auto"))

    def _figure(self, measurement: Measurement) -> ScoreFigure:
        low, high = interval_of(measurement, self._samples, self._confidence)
        score = measurement.score
        return ScoreFigure(score.metric, _finite(score.value), _finite(low), _finite(high), score.signature, score.label)


def _recorded(result: dict[str, Any], name: str) -> list[ScoreFigure]:
    """The scores of a recorded validation; the deciding metric first, with its interval. What is no score is passed over."""
    found = []
    for score in pick(result, name, default=[]):
        metric = pick(score, "metric")
        if metric not in METRICS:
            continue
        decides = name == "scores" and metric == result.get("metric")
        bounds = (_finite(result.get("low")), _finite(result.get("high"))) if decides else (None, None)
        signature, fallback = str(score.get("signature", "")), bool(score.get("fallback"))
        found.append(ScoreFigure(metric, _finite(score.get("value")), *bounds, signature, Score(metric, 0.0, signature, fallback).label))
    return sorted(found, key=lambda score: score.metric != result.get("metric"))


def label(metric: str) -> str:
    """A metric's name for people, also of one that this cvmk does not know."""
    return display_name(metric) if metric in METRICS else metric


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None
