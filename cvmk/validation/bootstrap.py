"""Bootstrap resampling of corpus scores (Koehn 2004), on sufficient statistics of sentences.

A resample is a row of counts, how often each sentence was drawn; counts [samples, sentences] times statistics [sentences, K] gives
every resampled corpus at once. The same seed draws the same sentences for every metric and system, which is what makes it paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cvmk.errors import DataError
from cvmk.validation.metrics import DEFAULT_TOKENIZATION, Measurement, References, good_direction, measure
from cvmk.validation.tokenization import Tokenization

SEED = 12345
"""sacrebleu's default seed: the same resamples as its paired test."""

_CELLS = 4_000_000
"""Cells of the count matrix that are held at a time."""


@dataclass(frozen=True)
class PairedResult:
    """Score of system A minus score of system B on the same sentences."""

    metric: str
    value_a: float
    value_b: float
    difference: float
    """value_a - value_b, in points of the metric; for TER a negative one is good."""
    low: float
    high: float
    """Confidence interval of the difference."""
    p_value: float
    """As sacrebleu's paired bootstrap computes it; 1 where the scores are equal."""
    samples: int
    confidence: float
    sentences: int = 0
    differing: int = 0
    """Sentences on which the two systems do not score alike: a difference that hangs on few of them says little, however sure the test is."""

    @property
    def gain(self) -> float:
        """How much better A is: the difference in the metric's good direction."""
        return self.difference * good_direction(self.metric)

    @property
    def worse(self) -> bool:
        """Whether the whole interval says that A is worse than B."""
        return self.high < 0 if good_direction(self.metric) > 0 else self.low > 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def interval(
    metric: str,
    hypotheses: Sequence[str],
    references: References,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = SEED,
    tokenization: Tokenization = DEFAULT_TOKENIZATION,
) -> tuple[float, float]:
    """Percentile confidence interval (low, high) of a corpus score. Raises as `metrics.score`."""
    return interval_of(measure(metric, hypotheses, references, tokenization), samples, confidence, seed)


def paired(
    metric: str,
    hypotheses_a: Sequence[str],
    hypotheses_b: Sequence[str],
    references: References,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = SEED,
    tokenization: Tokenization = DEFAULT_TOKENIZATION,
) -> PairedResult:
    """Paired bootstrap test of two systems. Raises as `metrics.score`."""
    a, b = (measure(metric, hypotheses, references, tokenization) for hypotheses in (hypotheses_a, hypotheses_b))
    return paired_of(a, b, samples, confidence, seed)


def interval_of(measurement: Measurement, samples: int = 1000, confidence: float = 0.95, seed: int = SEED) -> tuple[float, float]:
    """As `interval`, of a measurement that is there already."""
    return _percentiles(_resampled([measurement], samples, confidence, seed)[0], confidence)


def paired_of(a: Measurement, b: Measurement, samples: int = 1000, confidence: float = 0.95, seed: int = SEED) -> PairedResult:
    """As `paired`, of two measurements with the same metric, tokenisation and references. Raises ValueError where they differ.

    The p-value is defined as in sacrebleu and Moses, so that it can stand beside published ones: the share of resamples whose absolute
    difference exceeds the mean absolute difference by more than the real difference, the real corpus counted as one resample. For
    clear differences it is about half of a two-sided p-value; the interval is two-sided.
    """
    if a.score.metric != b.score.metric or a.score.signature != b.score.signature:
        raise ValueError(
            f"cannot compare {a.score.label} with {b.score.label} ({a.score.signature}; {b.score.signature}): "
            "measure both systems with the same metric, implementation and tokenisation"
        )
    if a.sentences != b.sentences:
        raise DataError(f"cannot compare systems on {a.sentences} and {b.sentences} sentences: translate the same sources with both")
    values_a, values_b = _resampled([a, b], samples, confidence, seed)
    difference = a.score.value - b.score.value
    low, high = _percentiles(values_a - values_b, confidence)
    sizes = np.abs(values_a - values_b)
    exceeding = int(np.count_nonzero(sizes - sizes.mean() > abs(difference)))
    p_value = (exceeding + 1) / (samples + 1) if difference else 1.0
    differing = int(np.count_nonzero((a.statistics != b.statistics).any(axis=1)))
    return PairedResult(a.score.metric, a.score.value, b.score.value, difference, low, high, p_value, samples, confidence, a.sentences, differing)


def _resampled(measurements: Sequence[Measurement], samples: int, confidence: float, seed: int) -> list[np.ndarray]:
    """For each measurement its corpus score on every resample, [samples]; the resamples are the same for all."""
    if samples < 2:
        raise ValueError(f"samples is {samples}: a bootstrap needs at least 2 resamples")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a share between 0 and 1")
    sentences = measurements[0].sentences
    generator = np.random.default_rng(seed)
    at_once = max(1, _CELLS // sentences)
    parts: list[list[np.ndarray]] = [[] for _ in measurements]
    for start in range(0, samples, at_once):
        rows = min(at_once, samples - start)
        drawn = generator.integers(0, sentences, size=(rows, sentences))
        drawn += sentences * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * sentences).reshape(rows, sentences).astype(np.float64)
        for part, measurement in zip(parts, measurements, strict=True):
            part.append(measurement.combine(counts @ measurement.statistics))
    return [np.concatenate(part) for part in parts]


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """The order statistics that leave (1 - confidence) / 2 of the values outside on each side."""
    ordered = np.sort(values)
    outside = math.floor(len(ordered) * (1 - confidence) / 2 + 1e-9)
    return float(ordered[outside]), float(ordered[len(ordered) - outside - 1])
