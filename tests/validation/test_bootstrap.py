from __future__ import annotations

import time

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

from cvmk.errors import DataError
from cvmk.validation.bootstrap import _resampled, interval, interval_of, paired, paired_of
from cvmk.validation.metrics import METRICS, Measurement, Score, measure, score

SACREBLEU = {"bleu": ("BLEU", BLEU), "chrf": ("chrF2", CHRF), "ter": ("TER", TER)}


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter"])
def test_p_value_and_interval_equal_sacrebleu(metric, damaged, references):
    """The same seed draws the same resamples, so the numbers must be equal; sacrebleu sums in float32."""
    ours, theirs = damaged(references * 5, seed=4, strength=0.3), damaged(references * 5, seed=5, strength=0.33)
    targets = references * 5
    name, scorer = SACREBLEU[metric]
    _, table = PairedTest([("base", theirs), ("system", ours)], {name: scorer()}, [targets], test_type="bs", n_samples=1000)()
    result = paired(metric, ours, theirs, targets)
    assert 0.002 < table[name][1].p_value < 0.5, "the case must be an undecided one to show anything"
    assert result.p_value == pytest.approx(table[name][1].p_value, abs=0.0005), "one resample more or less would be 0.001"
    assert result.difference == pytest.approx(table[name][1].score - table[name][0].score, abs=1e-9)
    low, high = interval(metric, ours, targets)
    assert (high - low) / 2 == pytest.approx(table[name][1].ci, abs=1e-3)


def test_resamples_equal_scores_of_resampled_text(hypotheses, references):
    """The counts-times-statistics shortcut against scoring the resampled text itself."""
    values = _resampled([measure("bleu", hypotheses, references)], 5, 0.95, seed=7)[0]
    drawn = np.random.default_rng(7).integers(0, len(references), size=(5, len(references)))
    for value, indices in zip(values, drawn, strict=True):
        assert value == pytest.approx(score("bleu", [hypotheses[i] for i in indices], [references[i] for i in indices]).value, abs=1e-9)


def test_interval_covers_the_mean_as_often_as_it_says():
    """400 normal samples of known mean 50: a 90 % interval misses it about 40 times (standard deviation 6)."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        values = generator.normal(0.5, 0.1, size=60)
        rows = np.stack([values, np.ones(60)], axis=1)
        low, high = interval_of(Measurement(Score("rouge", 100 * values.mean(), "", True), 60, lambda rows=rows: rows), 300, 0.9)
        covered += low <= 50 <= high
    assert 330 <= covered <= 382


@pytest.mark.parametrize("metric", METRICS)
def test_interval_contains_the_score_and_grows_with_confidence(metric, hypotheses, references):
    value = score(metric, hypotheses, references).value
    low, high = interval(metric, hypotheses, references, samples=500, confidence=0.95)
    assert low < value < high
    narrow = interval(metric, hypotheses, references, samples=500, confidence=0.6)
    assert low < narrow[0] < narrow[1] < high


@pytest.mark.parametrize("metric", METRICS)
def test_clear_difference(metric, hypotheses, worse_hypotheses, references):
    better = paired(metric, hypotheses, worse_hypotheses, references)
    worse = paired(metric, worse_hypotheses, hypotheses, references)
    assert better.p_value < 0.01 and not better.worse and better.gain > 0
    assert worse.p_value < 0.01 and worse.worse and worse.gain < 0
    assert worse.difference == -better.difference
    assert (worse.low, worse.high) == pytest.approx((-better.high, -better.low))


@pytest.mark.parametrize("metric", METRICS)
def test_equal_systems_do_not_differ(metric, hypotheses, references):
    result = paired(metric, hypotheses, hypotheses, references)
    assert (result.difference, result.low, result.high, result.p_value, result.worse) == (0, 0, 0, 1, False)


def test_deterministic(hypotheses, worse_hypotheses, references):
    first, again, other = (paired("ter", hypotheses, worse_hypotheses, references, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_many_sentences_are_resampled_in_parts(monkeypatch, hypotheses, references):
    whole = interval("chrf", hypotheses, references, samples=100)
    monkeypatch.setattr("cvmk.validation.bootstrap._CELLS", 7 * len(references))
    assert interval("chrf", hypotheses, references, samples=100) == pytest.approx(whole, abs=1e-9)


def test_one_sentence_is_legal():
    assert interval("chrf", ["ein Hund"], ["ein Hund"], samples=10) == (100, 100)


def test_empty_hypotheses_are_legal(references):
    assert interval("bleu", [""] * len(references), references, samples=100) == (0, 0)


@pytest.mark.data
def test_fast(multi30k):
    hypotheses, references = multi30k
    for metric in ("bleu", "chrf", "ter"):
        measurement = measure(metric, hypotheses, references)
        assert measurement.statistics.shape[0] == 1000
        start = time.process_time()
        paired_of(measurement, measurement, samples=1000)
        assert time.process_time() - start < 1


def test_wrong_arguments(hypotheses, references):
    with pytest.raises(ValueError, match="samples is 1"):
        interval("bleu", hypotheses, references, samples=1)
    with pytest.raises(ValueError, match="confidence is 95"):
        interval("bleu", hypotheses, references, confidence=95)
    with pytest.raises(DataError, match="40 and 39 sentences"):
        paired_of(measure("bleu", hypotheses, references), measure("bleu", hypotheses[1:], references[1:]))
    with pytest.raises(ValueError, match="BLEU with TER"):
        paired_of(measure("bleu", hypotheses, references), measure("ter", hypotheses, references))
    with pytest.raises(DataError, match="40 hypotheses but 39"):
        paired("bleu", hypotheses, hypotheses, references[1:])
