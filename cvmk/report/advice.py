"""What the figures of a run recommend, by rules: each has a name, says when it speaks, and is a function of figures alone.

`docs/report.md` lists them, and a test holds the two together. A rule that lacks its figures says nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cvmk.report.comparison import Comparison, SetScores, label, verdict
from cvmk.report.evaluations import Evaluation
from cvmk.report.history import Bin
from cvmk.report.run import QuantizedModel, Run, pick
from cvmk.report.search import COMPLETE, Search
from cvmk.validation.bootstrap import PairedResult
from cvmk.validation.metrics import good_direction


@dataclass(frozen=True)
class Advice:
    """A recommendation: what was seen, and what to do."""

    rule: str
    about: str
    """The run or model that it is about."""
    text: str


@dataclass(frozen=True)
class View:
    """A run as the rules see it."""

    run: Run
    scores: Sequence[SetScores]
    """Its own, of every set; not those of its teacher."""
    is_rival: bool = False
    """Whether it is a trial of a search beside the best one: only how it compares is of interest."""

    @property
    def metric(self) -> str:
        return str(self.run.setting("validation.metric", "bleu"))

    def gains(self) -> list[Bin]:
        """The validations by the deciding metric, of the last pass, turned so that more is better."""
        bins = self.run.history.curve(f"validation/{self.metric}").last_pass()
        sign = good_direction(self.metric)
        return [Bin(one.first, one.last, sign * one.mean, sign * one.low, sign * one.high) for one in bins]

    def pair(self, kind: str) -> tuple[Comparison, PairedResult] | None:
        """The deciding metric's comparison with the "teacher" or the "baseline": on the test set, else on the validation set."""
        for scores in reversed(self.scores):
            comparison: Comparison | None = getattr(scores, kind)
            if comparison is not None and (pair := comparison.pair(self.metric)) is not None:
                return comparison, pair
        return None

    def final(self) -> SetScores | None:
        """On the test set, else on the validation set."""
        return self.scores[-1] if self.scores else None


@dataclass(frozen=True)
class Rule:
    name: str
    when: str
    speak: Callable[[View], str | None]


RULES: list[Rule] = []


def _rule(when: str) -> Callable[[Callable[[View], str | None]], Callable[[View], str | None]]:
    def add(function: Callable[[View], str | None]) -> Callable[[View], str | None]:
        RULES.append(Rule(function.__name__.strip("_").replace("_", "-"), when, function))
        return function

    return add


def advise(views: Sequence[View], models: Sequence[QuantizedModel]) -> list[Advice]:
    """Every rule on every run, in the order of the runs; then what the quantised models say."""
    asked = [(view, rule) for view in views for rule in RULES if not view.is_rival or rule.speak is _no_better_than_baseline]
    found = [Advice(rule.name, view.run.name, text) for view, rule in asked if (text := rule.speak(view)) is not None]
    return found + [advice for model in models for advice in _quantization(model)]


# -- training ------------------------------------------------------------------------------------------------------------------
STILL_GAINS = 0.02
"""Share of the score that the last quarter of a training adds."""


@_rule("the last validation is the best, and is at least 2 % better than the best of the first three quarters of the training")
def _still_improving(view: View) -> str | None:
    points, history = view.gains(), view.run.history
    if len(points) < 3 or history.early_stop is not None or pick(view.run.report, "diverged"):
        return None
    early = [point for point in points if point.last <= 0.75 * points[-1].last]
    if not early or points[-1].mean < max(point.mean for point in points):
        return None
    best = max(point.mean for point in early)
    gain = points[-1].mean - best
    if gain <= 0 or gain < STILL_GAINS * abs(best):
        return None
    return (
        f"{label(view.metric)} still rose by {gain:.2f} points in the last quarter of the training and was best at its end, iteration {points[-1].last}: "
        f"train longer (training.iterations = {_rounded(1.5 * points[-1].last)} or more)"
    )


@_rule("the best validation lies in the first 70 % of the training, at least three came after it, and the training loss kept falling by 2 % or more")
def _over_fitting(view: View) -> str | None:
    found = _stalled(view)
    if found is None or (fell := _loss_fell(view, found.last)) is None or fell < 0.02:
        return None
    dropout = view.run.setting("model.dropout", 0.0)
    more = f"raise model.dropout (it is {dropout:g}; try {min(0.5, dropout + 0.1):g})" if isinstance(dropout, (int, float)) else "raise model.dropout"
    return (
        f"{label(view.metric)} was best at iteration {found.last} and no better in the {found.count} validations after it, while the training loss fell "
        f"by another {100 * fell:.0f} %: the model learns its training text by heart: {more}, take more training text, or end sooner (validation.patience)"
    )


@_rule("the best validation lies in the first 70 % of the training, at least three came after it, and the training loss has not fallen by 2 % since")
def _plateau(view: View) -> str | None:
    found = _stalled(view)
    if found is None or ((fell := _loss_fell(view, found.last)) is not None and fell >= 0.02):
        return None
    return (
        f"{label(view.metric)} was best at iteration {found.last} and no better in the {found.count} validations after it, and the training loss stands, too: "
        "let the learning rate fall (schedule.kind), take a larger model, or end sooner (validation.patience)"
    )


def _stalled(view: View) -> Bin | None:
    """The best validation, with the number of those after it, where it lies early."""
    points = view.gains()
    if len(points) < 4:
        return None
    at = max(range(len(points)), key=lambda index: points[index].mean)
    after = len(points) - 1 - at
    if after < 3 or points[at].last > 0.7 * points[-1].last:
        return None
    return Bin(points[at].first, points[at].last, points[at].mean, points[at].low, points[at].high, after)


def _loss_fell(view: View, step: int) -> float | None:
    """By which share the training loss is lower over the last tenth than it was around `step`."""
    points = view.run.history.curve("loss").last_pass()
    if not points:
        return None
    width = max(1, points[-1].last // 10)
    around = [point.mean for point in points if abs(point.last - step) <= width / 2]
    last = [point.mean for point in points if point.last > points[-1].last - width]
    if not around or not last:
        return None
    before, now = sum(around) / len(around), sum(last) / len(last)
    return (before - now) / abs(before) if before else None


@_rule("the training went back to a checkpoint at least once, or gave up")
def _rolled_back(view: View) -> str | None:
    diverged = pick(view.run.report, "diverged")
    rollbacks = view.run.history.rollbacks
    if not rollbacks and not diverged:
        return None
    rate = view.run.setting("optimizer.learning_rate")
    smaller = f" (it is {rate:g}; try {rate / 2:g})" if isinstance(rate, (int, float)) else ""
    count = len(rollbacks)
    times = f"went back {'once' if count == 1 else f'{count} times'}, last because {rollbacks[-1].problem}" if count else "diverged"
    end = " and gave up in the end" if diverged and count else ""
    return f"training {times}{end}: lower optimizer.learning_rate{smaller} or warm up longer (schedule.warmup)"


@_rule("more than half of the iterations logged after the warm-up (20 at least) had their gradient clipped")
def _clipping(view: View) -> str | None:
    history = view.run.history
    if history.logged < 20 or 2 * history.clipped <= history.logged:
        return None
    share = 100 * history.clipped / history.logged
    return (
        f"{share:.0f} % of the logged gradients were beyond training.clip_norm = {view.run.setting('training.clip_norm', 0.0):g} after the warm-up, so that "
        "clipping sets the size of most steps: lower optimizer.learning_rate, or raise training.clip_norm if the loss falls smoothly"
    )


@_rule("a loss or gradient norm that was logged is no number")
def _not_finite(view: View) -> str | None:
    history = view.run.history
    count = max(history.curve(name).not_finite for name in ("loss", "gradient_norm"))
    if not count:
        return None
    return f"{count} logged iterations have a loss or a gradient that is no number: lower optimizer.learning_rate, or train in float32 (training.precision)"


@_rule("at least 1 % of the iterations (and 3) have an anomalous loss or gradient norm")
def _anomalies(view: View) -> str | None:
    found, iterations = view.run.history.anomalies, view.run.history.iterations
    count = max(found["loss"], found["gradient_norm"])
    if count < 3 or count < RARE * iterations:
        return None
    return (
        f"{found['loss']} iterations have an anomalous loss and {found['gradient_norm']} an anomalous gradient norm, of {iterations}: "
        "lower optimizer.learning_rate, warm up longer (schedule.warmup), or look for damaged pairs in the training text"
    )


RARE = 0.01
WAIT = 0.1


@_rule("iterations spend more than 10 % of their time waiting for batches")
def _data_wait(view: View) -> str | None:
    history = view.run.history
    if history.seconds <= 0 or history.data_wait <= WAIT * history.seconds:
        return None
    return (
        f"{100 * history.data_wait / history.seconds:.0f} % of the training time is spent waiting for batches: put data.cache on a faster disk, "
        "or leave a core to the system (run.threads)"
    )


@_rule("at least 1 % of the iterations (and 3) were slower than usual by half")
def _uneven_speed(view: View) -> str | None:
    count, iterations = view.run.history.anomalies["throughput"], view.run.history.iterations
    if count < 3 or count < RARE * iterations:
        return None
    return f"{count} of {iterations} iterations were slower than usual by half: something else uses this machine, or run.threads is more than its cores"


# -- scores --------------------------------------------------------------------------------------------------------------------
@_rule("the run validated twice at least, and its deciding metric was 0 or no number every time")
def _nothing_measured(view: View) -> str | None:
    count = view.run.history.counts["validation"]
    if count < 2 or any(one.mean != 0 for one in view.run.history.curve(f"validation/{view.metric}").bins):
        return None
    other = "chrf" if view.metric != "chrf" else "bleu"
    return f'{label(view.metric)} was 0 or no number at all {count} validations: it cannot choose a checkpoint; set validation.metric = "{other}"'


FAR = 0.05


@_rule("the student is worse than its teacher, significantly and by more than 5 % of the teacher's score")
def _far_from_teacher(view: View) -> str | None:
    _, pair = view.pair("teacher") or (None, None)
    if pair is None or not pair.worse or abs(pair.difference) <= FAR * abs(pair.value_b):
        return None
    weights = ", ".join(f"distillation.{key} = {view.run.setting(f'distillation.{key}', 0):g}" for key in ("alpha", "beta", "gamma"))
    return (
        f"the student is {abs(pair.difference):.2f} points of {label(pair.metric)} behind its teacher ({pair.value_a:.2f} against {pair.value_b:.2f}): "
        f"train longer, give it the teacher's own translations (distillation.sequence_level), take other weights ({weights}), or a larger student"
    )


@_rule("the student is not significantly worse than its teacher")
def _weak_teacher(view: View) -> str | None:
    _, pair = view.pair("teacher") or (None, None)
    if pair is None or pair.worse:
        return None
    return (
        f"the teacher is no better than its student ({label(pair.metric)} {pair.value_b:.2f} against {pair.value_a:.2f}): there is little left to distil; "
        "train the teacher longer, or take a better one"
    )


@_rule("the difference from the baseline is not significant")
def _no_better_than_baseline(view: View) -> str | None:
    comparison, pair = view.pair("baseline") or (None, None)
    if comparison is None or pair is None or verdict(pair) != "no significant difference":
        return None
    return (
        f"{label(pair.metric)} differs from {comparison.other} by {pair.difference:+.2f} points, which {pair.sentences} sentences cannot tell from chance "
        f"({pair.low:+.2f} to {pair.high:+.2f}): keep the simpler or faster of the two, or repeat both with other seeds (run.seed)"
    )


WIDE = 0.05


@_rule("half of the interval of the deciding metric is more than 5 % of the score and more than 1 point, on less than 2,000 sentences")
def _few_sentences(view: View) -> str | None:
    final = view.final()
    score = None if final is None else final.score(view.metric)
    if final is None or score is None or score.value is None or score.low is None or score.high is None or not final.sentences or final.sentences >= 2000:
        return None
    half = (score.high - score.low) / 2
    if half <= max(1.0, WIDE * abs(score.value)):
        return None
    where = "data.test" if final.set == "test" else "data.valid, validation.max_sentences"
    return (
        f"{final.sentences} {final.set} sentences tell {score.label} only to within ±{half:.1f} points: "
        f"evaluate on more of them ({where}) before you trust smaller differences"
    )


@_rule("the translations have less than 85 % or more than 115 % of the words of their references")
def _length(view: View) -> str | None:
    evaluation = _evaluation(view)
    if evaluation is None:
        return None
    ours, theirs = (sum(len(text.split()) for text in texts) for texts in (evaluation.hypotheses, evaluation.references))
    if not theirs or 0.85 <= ours / theirs <= 1.15:
        return None
    ratio = ours / theirs
    what = "stops too soon" if ratio < 1 else "does not know when to stop"
    return f"the translations have {100 * ratio:.0f} % of the words of their references: the model {what}; train longer, or look for misaligned training text"


@_rule("at least 2 % of the translations are empty, or say the same word four times in a row")
def _degenerate(view: View) -> str | None:
    evaluation = _evaluation(view)
    if evaluation is None:
        return None
    bad = sum(not text.strip() or _stutters(text) for text in evaluation.hypotheses)
    count = len(evaluation.hypotheses)
    if bad < 0.02 * count:
        return None
    return f"{bad} of {count} translations are empty or repeat a word over and over: train longer, or lower optimizer.learning_rate"


def _evaluation(view: View) -> Evaluation | None:
    final = view.final()
    return None if final is None else view.run.evaluations.get(final.set)


def _stutters(text: str) -> bool:
    words = text.split()
    return any(len(set(words[at : at + 4])) == 1 for at in range(len(words) - 3))


# -- quantisation --------------------------------------------------------------------------------------------------------------
QUANTIZATION_RULE = "quantisation-costs"
QUANTIZATION_WHEN = "a quantised model is significantly worse than what it was made of"


def _quantization(model: QuantizedModel) -> Iterator[Advice]:
    pairs = pick(model.report, "paired", default=[])
    first = pairs[0] if isinstance(pairs, list) and pairs else None
    high, drop = pick(first, "high"), pick(first, "difference")
    if not isinstance(high, (int, float)) or not isinstance(drop, (int, float)) or high >= 0:
        return
    method, recovery = pick(model.report, "recipe", "method"), pick(model.report, "recovery")
    other = "" if method == "gptq" else "--method gptq, "
    train = "" if recovery else "--recover 1000, "
    text = f"{label(str(pick(first, 'metric')))} falls by {-drop:.2f} points, which is no chance ({pick(first, 'low', default=0):+.2f} to {high:+.2f})"
    yield Advice(QUANTIZATION_RULE, model.path.name, f"{text}: try {other}{train}or a smaller --max-drop, which keeps more of it in a higher precision")


# -- searches ------------------------------------------------------------------------------------------------------------------
SEARCH_RULES = {
    "at-the-edge": "the best trial of a search of five complete ones at least has a number in the outer 5 % of its range, and not at 0",
    "trials-failed": "at least 10 % of the trials of a search (and 2) failed",
}
_EDGE, _FEW_TRIALS = 0.05, 5


def advise_searches(searches: Sequence[Search]) -> list[Advice]:
    return [Advice(rule, search.name, text) for search in searches for rule, text in (*_edges(search), *_failed(search))]


def _edges(search: Search) -> Iterator[tuple[str, str]]:
    best = search.best
    if best is None or search.counts()[COMPLETE] < _FEW_TRIALS:
        return
    for key, searched in search.space.items():
        value, ends = best.parameters.get(key), [pick(searched, end) for end in ("low", "high")]
        if not all(isinstance(one, (int, float)) for one in (value, *ends)):
            continue
        is_log = bool(pick(searched, "log")) and min(value, *ends) > 0
        at, low, high = (math.log(one) if is_log else one for one in (value, *ends))
        for end, name, distance in ((ends[0], "low", at - low), (ends[1], "high", high - at)):
            if end != 0 and distance <= _EDGE * (high - low):
                text = f"the best trial, {best.name}, has {key} = {value:.4g} at the edge of what was searched ({ends[0]:g} to {ends[1]:g})"
                more = "smaller" if name == "low" else "larger"
                yield "at-the-edge", f"{text}: what is better may lie beyond, so search again with a {more} search.space.{key}.{name}"


def _failed(search: Search) -> Iterator[tuple[str, str]]:
    reasons = Counter(trial.reason for trial in search.trials.values() if trial.state == "failed")
    count = reasons.total()
    if count >= max(2, 0.1 * len(search.trials)):
        reason, times = reasons.most_common(1)[0]
        text = f"{count} of {len(search.trials)} trials failed, {times} of them because of this: {reason}"
        yield "trials-failed", f"{text}; narrow search.space to what can be trained"


def _rounded(value: float) -> int:
    """To two digits."""
    digits = max(0, len(str(int(value))) - 2)
    unit: int = 10**digits
    return round(value / unit) * unit
