"""Scores of a model during training: against the references, against its teacher, with the noise of the validation set."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvmk.config.schema import ValidationConfig
from cvmk.errors import ConfigError, DataError
from cvmk.files import write_json, write_text
from cvmk.validation.bootstrap import PairedResult, interval_of, paired_of
from cvmk.validation.metrics import Measurement, Score, blind_spot, good_direction, measure
from cvmk.validation.tokenization import tokenization

SAMPLES_SHOWN = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One translated sentence of the validation set."""

    source: str
    hypothesis: str
    reference: str

    def to_dict(self) -> dict[str, str]:
        return {"source": self.source, "hypothesis": self.hypothesis, "reference": self.reference}


@dataclass(frozen=True)
class ValidationResult:
    """One validation. `hypotheses` stay out of `to_dict`."""

    step: int
    metric: str
    """The metric that chooses the best checkpoint."""
    value: float
    low: float
    high: float
    """Bootstrap interval of `value`."""
    confidence: float
    scores: tuple[Score, ...]
    """Against the references."""
    agreement: tuple[Score, ...]
    """Against the teacher's own output; empty without a teacher."""
    sentences: int
    seconds: float
    """Time of the translation alone."""
    tokens: int | None
    """Target tokens; None where the translator does not count them."""
    samples: tuple[Sample, ...] = ()
    hypotheses: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @property
    def sentences_per_second(self) -> float:
        return self.sentences / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float | None:
        if self.tokens is None:
            return None
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def score(self, metric: str) -> Score:
        """The score of one metric against the references. Raises KeyError where it was not computed."""
        for score in self.scores:
            if score.metric == metric:
                return score
        raise KeyError(metric)

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "metric": self.metric,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "scores": [score.to_dict() for score in self.scores],
            "agreement": [score.to_dict() for score in self.agreement],
            "sentences": self.sentences,
            "seconds": self.seconds,
            "sentences_per_second": self.sentences_per_second,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "samples": [sample.to_dict() for sample in self.samples],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any], hypotheses: Sequence[str] = ()) -> ValidationResult:
        kept = {name: value[name] for name in ("step", "metric", "value", "low", "high", "confidence", "sentences", "seconds", "tokens")}
        return cls(
            **kept,
            scores=tuple(Score.from_dict(score) for score in value["scores"]),
            agreement=tuple(Score.from_dict(score) for score in value["agreement"]),
            samples=tuple(Sample(**sample) for sample in value["samples"]),
            hypotheses=tuple(hypotheses),
        )


class DistillationValidator:
    """Translates the validation set, scores it, keeps the history, and tells improvement and regression from noise.

    `references` and `teacher_outputs` are as long as `sources`; only the first `config.max_sentences` are used. With `history_path`
    the history is written there after every validation (a JSON list, the file is replaced whole); with `hypotheses_folder` the
    translations are written to step-N.txt in it, one a line. `language` is the target's (BCP 47): it chooses the tokenisers of BLEU and TER, which
    every comparison here shares, where `config.bleu_tokenize` does not; None lets the script of the references choose. `say` gets what a person
    should know, a sentence at a time (default: a warning of the logger). Raises ConfigError where the tokeniser of the configuration cannot be used.
    """

    def __init__(
        self,
        config: ValidationConfig,
        sources: Sequence[str],
        references: Sequence[str],
        teacher_outputs: Sequence[str] | None = None,
        history_path: str | os.PathLike[str] | None = None,
        hypotheses_folder: str | os.PathLike[str] | None = None,
        language: str | None = None,
        say: Callable[[str], None] = _log.warning,
    ) -> None:
        if not sources:
            raise DataError("the validation set is empty: give at least one pair in data.valid")
        for name, texts in (("references", references), ("teacher outputs", teacher_outputs)):
            if texts is not None and len(texts) != len(sources):
                raise DataError(f"the validation set has {len(sources)} sources but {len(texts)} {name}: give one for each source")
        self.config = config
        self.sources = list(sources[: config.max_sentences])
        self.references = list(references[: config.max_sentences])
        self.teacher_outputs = None if teacher_outputs is None else list(teacher_outputs[: config.max_sentences])
        self.history_path = history_path
        self.hypotheses_folder = hypotheses_folder
        self.language, self.say = language, say
        self.tokenization = tokenization(language, self.references, config.bleu_tokenize)
        self.history: list[ValidationResult] = []
        self.best: ValidationResult | None = None

    @property
    def metrics(self) -> list[str]:
        """The metric that chooses the best checkpoint, then the other ones of the configuration."""
        return list(dict.fromkeys([self.config.metric, *self.config.metrics]))

    def without_history(self) -> DistillationValidator:
        """A validator of the same texts that scores in the same way, with a history of its own that is not written."""
        return DistillationValidator(self.config, self.sources, self.references, self.teacher_outputs, language=self.language, say=self.say)

    def check_metric(self, *, refuse: bool = True) -> None:
        """Say what the tokenisers have to say; raise ConfigError, or say it where that is not to `refuse`, if the deciding metric is blind.

        A metric is blind where it does not even know the references again: it would choose any checkpoint.
        """
        words, metric = self.tokenization, self.config.metric
        if words.note and metric in ("bleu", "ter"):
            self.say(words.note + (f'; chrF judges such text better: validation.metric = "{words.better}"' if words.better else ""))
        problem = blind_spot(metric, self.references, words)
        if problem is not None:
            by_character = ', or validation.bleu_tokenize = "char"' if metric == "bleu" and words.bleu != "char" else ""
            text = (
                f'validation.metric = "{metric}" cannot choose the best checkpoint: {problem}; '
                f'set validation.metric = "chrf"{by_character}, or correct data.target_language ({self.language or "not given"})'
            )
            if refuse:
                raise ConfigError(text)
            self.say(text)

    def run(self, translator: Any, step: int, **options: Any) -> ValidationResult:
        """Validate the model behind `translator` and add the result to the history.

        `translator` has `translate(texts, beam_size=...)` giving objects with `.text` (and perhaps `.tokens`), or is a callable from a
        list of texts to a list of texts. `options` go to `translator.translate` too, such as max_batch_tokens. `best` becomes this
        result where it is as good at least: of equals the latest has learnt most. Raises DataError where a file cannot be written.
        """
        start = time.perf_counter()
        hypotheses, tokens = translate(translator, self.sources, self.config.beam_size, **options)
        seconds = time.perf_counter() - start
        result = self._judge(step, hypotheses, seconds, tokens)
        self.history.append(result)
        if self.best is None or not self._gain(result.value, self.best.value) < 0:
            self.best = result
        self._write(result)
        return result

    def _judge(self, step: int, hypotheses: Sequence[str], seconds: float, tokens: int | None) -> ValidationResult:
        measurements = [measure(metric, hypotheses, self.references, self.tokenization) for metric in self.metrics]
        main, teacher = measurements[0], self.teacher_outputs
        low, high = interval_of(main, self.config.bootstrap, self.config.confidence)
        agreement = [] if teacher is None else [measure(metric, hypotheses, teacher, self.tokenization).score for metric in self.metrics]
        return ValidationResult(
            step=step,
            metric=main.score.metric,
            value=main.score.value,
            low=low,
            high=high,
            confidence=self.config.confidence,
            scores=tuple(measurement.score for measurement in measurements),
            agreement=tuple(agreement),
            sentences=len(self.sources),
            seconds=seconds,
            tokens=tokens,
            samples=tuple(map(Sample, self.sources[:SAMPLES_SHOWN], hypotheses, self.references)),
            hypotheses=tuple(hypotheses),
        )

    def better(self, result: ValidationResult, best: ValidationResult | None) -> bool:
        """Whether `result` improves on `best` by min_delta at least, in the metric's good direction. Anything improves on None."""
        return self.improves(result.value, None if best is None else best.value)

    def improves(self, value: float, reference: float | None) -> bool:
        """As `better`, of scores of the deciding metric."""
        return reference is None or (gain := self._gain(value, reference)) > 0 and gain >= self.config.min_delta

    def _gain(self, value: float, reference: float) -> float:
        """How much better `value` is, in points; what is no number is worse than every number."""
        if math.isnan(value) or math.isnan(reference):
            return (math.isnan(reference) - math.isnan(value)) * math.inf if math.isnan(value) != math.isnan(reference) else 0.0
        return (value - reference) * good_direction(self.config.metric)

    def compare(self, result: ValidationResult, best: ValidationResult) -> PairedResult:
        """Paired bootstrap of `result` against `best`. Raises ValueError where the hypotheses of one are no longer known."""
        return paired_of(self._measured(result), self._measured(best), self.config.bootstrap, self.config.confidence)

    def regressed(self, result: ValidationResult, best: ValidationResult | None) -> bool:
        """Whether `result` is worse than `best` beyond noise: the confidence interval of the difference excludes "equally good"."""
        if best is None or result is best or self.better(result, best):
            return False
        return self.compare(result, best).worse

    def state_dict(self) -> dict[str, Any]:
        """History and best result with its hypotheses, JSON-serialisable."""
        best = None if self.best is None else {"result": self.best.to_dict(), "hypotheses": list(self.best.hypotheses)}
        return {"history": [result.to_dict() for result in self.history], "best": best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state; the history file is rewritten to match it.

        Where the best result was scored in another way (another tokeniser, another version of the metric), it is scored anew, so that it can be
        compared, and that is said. The history keeps the scores that it had, with their signatures. Raises ConfigError where the validation set has
        another size.
        """
        best = state["best"]
        if best is not None and len(best["hypotheses"]) != len(self.sources):
            raise ConfigError(
                f"the saved run was validated on {len(best['hypotheses'])} sentences, this one has {len(self.sources)}: "
                "resume with the same data.valid and validation.max_sentences"
            )
        self.history = [ValidationResult.from_dict(result) for result in state["history"]]
        self.best = None if best is None else self._rescored(ValidationResult.from_dict(best["result"], best["hypotheses"]))
        self._write_history()

    def _rescored(self, result: ValidationResult) -> ValidationResult:
        """The result, with new scores where those of its deciding metric were made in another way than this validator's."""
        before, now = result.score(result.metric), self._measured(result).score
        if before.signature == now.signature:
            return result
        self.say(
            f"the saved run scored {before.label} by {before.signature}, this one by {now.signature}: "
            f"its best result, iteration {result.step}, goes from {before.value:.2f} to {now.value:.2f}, and older scores are not comparable with new ones"
        )
        return self._judge(result.step, result.hypotheses, result.seconds, result.tokens)

    def _measured(self, result: ValidationResult) -> Measurement:
        if len(result.hypotheses) != len(self.references):
            raise ValueError(
                f"the validation of step {result.step} has {len(result.hypotheses)} hypotheses for {len(self.references)} references: "
                "keep the result that run() returned"
            )
        return measure(result.metric, result.hypotheses, self.references, self.tokenization)

    def _write(self, result: ValidationResult) -> None:
        if self.hypotheses_folder is not None:
            lines = (" ".join(hypothesis.splitlines()) + "\n" for hypothesis in result.hypotheses)
            write_text(Path(self.hypotheses_folder) / f"step-{result.step}.txt", "".join(lines))
        self._write_history()

    def _write_history(self) -> None:
        if self.history_path is not None:
            write_json(self.history_path, [result.to_dict() for result in self.history])


def translate(translator: Any, sources: Sequence[str], beam_size: int, **options: Any) -> tuple[list[str], int | None]:
    """Translations of `sources` and the number of their tokens, None where the translator does not tell.

    Takes what `DistillationValidator.run` takes; `options` go to `translator.translate`. Raises ValueError where the number of
    translations differs from the number of sources.
    """
    method: Callable[..., Any] | None = getattr(translator, "translate", None)
    outputs = list(method(list(sources), beam_size=beam_size, **options) if method else translator(list(sources)))
    if len(outputs) != len(sources):
        raise ValueError(f"the translator gave {len(outputs)} translations for {len(sources)} sources: it must give one for each")
    texts = [output if isinstance(output, str) else output.text for output in outputs]
    counts: list[Any] = [getattr(output, "tokens", None) for output in outputs]
    if any(count is None for count in counts):
        return texts, None
    return texts, sum((count if isinstance(count, int) else len(count)) for count in counts)
