"""What quantisation cost, on an evaluation set: scores with intervals, paired; the sentences that changed most; and whether that is too much."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cvmk.validation.bootstrap import PairedResult, interval_of, paired_of
from cvmk.validation.metrics import Measurement, measure
from cvmk.validation.tokenization import Tokenization
from cvmk.validation.validator import translate

if TYPE_CHECKING:
    from cvmk.inference import Translator

METRICS = ("bleu", "chrf")
"""The first one decides."""
CHANGED = 20
"""Sentences that are shown."""


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of the evaluation set."""

    hypotheses: tuple[str, ...]
    measurements: tuple[Measurement, ...]
    seconds: float
    tokens: int | None

    @property
    def value(self) -> float:
        """The score that decides."""
        return self.measurements[0].score.value

    def to_dict(self, samples: int, confidence: float) -> dict[str, Any]:
        scores = []
        for measurement in self.measurements:
            low, high = interval_of(measurement, samples, confidence)
            scores.append({**measurement.score.to_dict(), "low": low, "high": high})
        rate = None if self.tokens is None or not self.seconds else self.tokens / self.seconds
        return {"scores": scores, "seconds": self.seconds, "tokens": self.tokens, "tokens_per_second": rate}


class Gate:
    """Evaluates models on the same sentences, and compares them with the first one.

    max_drop is how many points of BLEU a model may lose; None: any number.
    """

    def __init__(
        self, sources: Sequence[str], references: Sequence[str], words: Tokenization, *, max_drop: float | None = None, beam_size: int = 1,
        samples: int = 1000, confidence: float = 0.95,
    ) -> None:  # fmt: skip
        self.sources, self.references, self.words = list(sources), list(references), words
        self.max_drop, self._beam_size, self._samples, self._confidence = max_drop, beam_size, samples, confidence

    def evaluate(self, translator: Translator) -> Evaluation:
        """Translate and score. The clock runs while it translates, after a few sentences that warm it up."""
        translate(translator, self.sources[:16], self._beam_size, on_long="truncate")
        start = time.perf_counter()
        hypotheses, tokens = translate(translator, self.sources, self._beam_size, on_long="truncate")
        seconds = time.perf_counter() - start
        return Evaluation(tuple(hypotheses), tuple(measure(metric, hypotheses, self.references, self.words) for metric in METRICS), seconds, tokens)

    def passes(self, before: Evaluation, after: Evaluation) -> bool:
        return self.max_drop is None or before.value - after.value <= self.max_drop

    def compare(self, before: Evaluation, after: Evaluation) -> dict[str, Any]:
        """The part of a report that says what changed; see `quantize.quantize`."""
        pairs = [self._paired(ours, theirs) for ours, theirs in zip(after.measurements, before.measurements, strict=True)]
        return {
            "before": before.to_dict(self._samples, self._confidence),
            "after": after.to_dict(self._samples, self._confidence),
            "paired": [pair.to_dict() for pair in pairs],
            "gate": {"metric": METRICS[0], "max_drop": self.max_drop, "drop": before.value - after.value, "passed": self.passes(before, after)},
            "changed": self._changed(before, after),
        }

    def _paired(self, ours: Measurement, theirs: Measurement) -> PairedResult:
        return paired_of(ours, theirs, self._samples, self._confidence)

    def _changed(self, before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
        """The sentences whose translations are least alike, by chrF of the one against the other; equal ones are left out."""
        likeness = measure("chrf", after.hypotheses, before.hypotheses, self.words)
        scores = [float(score) for score in likeness.combine(likeness.statistics)]
        changed = [index for index in range(len(scores)) if before.hypotheses[index] != after.hypotheses[index]]
        return [
            {
                "line": index + 1,
                "source": self.sources[index],
                "reference": self.references[index],
                "before": before.hypotheses[index],
                "after": after.hypotheses[index],
                "likeness": scores[index],
            }
            for index in sorted(changed, key=lambda index: (scores[index], index))[:CHANGED]
        ]
