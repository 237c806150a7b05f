"""Scores of translations: BLEU, chrF and TER by sacrebleu, ROUGE-L by rouge-score, BERTScore by bert-score, or the built-in fallbacks.

A fallback is used only where the package is missing (or BERTScore's model cannot be loaded), and its signature begins with
`cvmk-fallback|`. All scores are on the scale 0 to 100. The packages are imported when they are needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import numpy as np

import cvmk
from cvmk.errors import ConfigError, DataError
from cvmk.validation.fallback import bleu, chrf, embedding_score, rouge, ter
from cvmk.validation.tokenization import Tokenization, words_of

METRICS = ("bleu", "chrf", "ter", "rouge", "bertscore")
LOWER_IS_BETTER = frozenset({"ter"})
BERTSCORE_MODEL = "bert-base-multilingual-cased"
"""The model that bert-score itself takes for German and most other languages; the variable CVMK_BERTSCORE_MODEL names another."""

References = Sequence[str] | Sequence[Sequence[str]]
"""One reference a hypothesis, or several sets of references, each as long as the hypotheses."""

DEFAULT_TOKENIZATION = Tokenization()

_BUILT_IN: dict[str, ModuleType] = {"bleu": bleu, "chrf": chrf, "ter": ter, "rouge": rouge, "bertscore": embedding_score}
_PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "ter": "sacrebleu", "rouge": "rouge-score", "bertscore": "bert-score"}


@dataclass(frozen=True)
class Score:
    """A corpus score, 0 to 100 (TER may be larger), with the signature that makes it comparable."""

    metric: str
    value: float
    signature: str
    fallback: bool

    @property
    def label(self) -> str:
        """The metric's name for a table: a fallback says so."""
        return f"{display_name(self.metric)} (fallback)" if self.fallback else display_name(self.metric)

    def to_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "value": self.value, "signature": self.signature, "fallback": self.fallback}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Score:
        return cls(**value)


@dataclass(frozen=True)
class Available:
    """Which implementation `score` takes for a metric. For BERTScore the model is tried only when it is needed."""

    metric: str
    package: str
    version: str | None
    fallback: bool


class Measurement:
    """A corpus score and the sufficient statistics that a bootstrap resamples."""

    def __init__(self, score: Score, sentences: int, statistics: Callable[[], np.ndarray]) -> None:
        self.score = score
        self.sentences = sentences
        self._statistics = statistics

    @cached_property
    def statistics(self) -> np.ndarray:
        """float64 [sentences, K]; `combine` of their sum is the corpus score."""
        return self._statistics()

    def combine(self, sums: np.ndarray) -> np.ndarray:
        """Corpus scores [...] of summed statistics [..., K]."""
        scores: np.ndarray = _BUILT_IN[self.score.metric].value(sums)
        return scores


def check_metric(metric: str) -> None:
    """Raises ConfigError where `metric` is no metric."""
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}: choose from {', '.join(METRICS)}")


def display_name(metric: str) -> str:
    return {"bleu": "BLEU", "chrf": "chrF2", "ter": "TER", "rouge": "ROUGE-L", "bertscore": "BERTScore"}[metric]


def good_direction(metric: str) -> int:
    """+1 where a larger score is better, -1 where a smaller one is (TER)."""
    return -1 if metric in LOWER_IS_BETTER else 1


def score(metric: str, hypotheses: Sequence[str], references: References, tokenization: Tokenization = DEFAULT_TOKENIZATION) -> Score:
    """The corpus score of `hypotheses`. Empty hypotheses are legal. `tokenization` says what words are in BLEU and TER.

    Both sides are composed (NFC) first: a letter and its accent are one character or two, and the text is the same.
    Raises ConfigError for an unknown metric, DataError for an empty list or unequal lengths.
    """
    return measure(metric, hypotheses, references, tokenization).score


def measure(metric: str, hypotheses: Sequence[str], references: References, tokenization: Tokenization = DEFAULT_TOKENIZATION) -> Measurement:
    """As `score`, with the statistics for a bootstrap, which are computed when they are first asked for."""
    check_metric(metric)
    hypotheses = _composed(hypotheses)
    sets = [_composed(group) for group in _reference_sets(hypotheses, references)]
    if metric in ("bleu", "chrf", "ter"):
        return _by_sacrebleu(metric, hypotheses, sets, tokenization) or _by_fallback(metric, hypotheses, sets, tokenization)
    means = _rouge_score(hypotheses, sets) if metric == "rouge" else _bert_score(hypotheses, sets)
    if means is None:
        return _by_fallback(metric, hypotheses, sets, tokenization)
    values, signature = means
    rows = np.stack([values, np.ones_like(values)], axis=1)
    return Measurement(Score(metric, float(100.0 * values.mean()), signature, False), len(hypotheses), lambda: rows)


def blind_spot(metric: str, references: Sequence[str], tokenization: Tokenization = DEFAULT_TOKENIZATION) -> str | None:
    """Why the metric cannot judge these references, in a sentence, or None: the references themselves must get a good score.

    BLEU gives them 0 where no sentence has four words. BERTScore is not asked: its model takes any text.
    """
    if metric == "bertscore" or not references:
        return None
    own = score(metric, references, references, tokenization)
    if metric in LOWER_IS_BETTER or own.value > 50:
        return None
    return f"{own.label} gives the references themselves only {own.value:.2f}: they have too few words for it ({own.signature})"


def available() -> dict[str, Available]:
    """For every metric: its package, the installed version, and whether the fallback stands in for it. Imports nothing."""
    found: dict[str, Available] = {}
    for metric, package in _PACKAGES.items():
        version: str | None = None
        if importlib.util.find_spec(package.replace("-", "_")) is not None:
            try:
                version = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                version = "unknown"
        found[metric] = Available(metric, package, version, fallback=version is None)
    return found


def _composed(texts: Sequence[str]) -> list[str]:
    return [unicodedata.normalize("NFC", text) for text in texts]


def _reference_sets(hypotheses: list[str], references: References) -> list[list[str]]:
    if not hypotheses:
        raise DataError("there are no hypotheses to score: give at least one sentence")
    if not references:
        raise DataError(f"there are no references for {len(hypotheses)} hypotheses: give one for each")
    sets: list[list[Any]] = [list(references)] if isinstance(references[0], str) else [list(group) for group in references]
    for number, group in enumerate(sets, 1):
        if len(group) != len(hypotheses):
            name = "references" if len(sets) == 1 else f"references in set {number}"
            raise DataError(f"{len(hypotheses)} hypotheses but {len(group)} {name}: give one reference for each hypothesis")
    return sets


def _by_fallback(metric: str, hypotheses: list[str], sets: list[list[str]], tokenization: Tokenization) -> Measurement:
    built_in = _BUILT_IN[metric]
    name = _tokenizer(metric, sets, tokenization)
    rows = _statistics(metric, hypotheses, sets, name)
    described = built_in.signature(len(sets)) if name is None else built_in.signature(len(sets), name)
    signature = f"cvmk-fallback|{described}|version:{cvmk.__version__}"
    return Measurement(Score(metric, float(built_in.value(rows.sum(axis=0))), signature, True), len(hypotheses), lambda: rows)


def _by_sacrebleu(metric: str, hypotheses: list[str], sets: list[list[str]], tokenization: Tokenization) -> Measurement | None:
    try:
        from sacrebleu.metrics import BLEU, CHRF, TER
    except ImportError:
        return None
    name = _tokenizer(metric, sets, tokenization)
    scorer: Any
    if metric == "bleu":
        scorer = BLEU(tokenize=name)
    elif metric == "ter":
        scorer = TER(normalized=name == "asian", asian_support=name == "asian")
    else:
        scorer = CHRF()
    value = scorer.corpus_score(hypotheses, sets).score
    result = Score(metric, float(value), str(scorer.get_signature()), False)
    return Measurement(result, len(hypotheses), lambda: _statistics(metric, hypotheses, sets, name))


def _tokenizer(metric: str, sets: list[list[str]], tokenization: Tokenization) -> str | None:
    """The name of the metric's tokeniser; None for a metric without a choice."""
    if metric == "rouge":
        return rouge.tokenizer_for(sets)
    return {"bleu": tokenization.bleu, "ter": tokenization.ter}.get(metric)


def _statistics(metric: str, hypotheses: list[str], sets: list[list[str]], tokenizer: str | None) -> np.ndarray:
    if metric == "bleu":
        return bleu.statistics(hypotheses, sets, words_of(tokenizer or "13a"))
    if metric == "ter":
        return ter.statistics(hypotheses, sets, ter.TOKENIZERS[tokenizer or "tercom"])
    if metric == "rouge":
        return rouge.statistics(hypotheses, sets, rouge.TOKENIZERS[tokenizer or "default"])
    rows: np.ndarray = _BUILT_IN[metric].statistics(hypotheses, sets)
    return rows


def _rouge_score(hypotheses: list[str], sets: list[list[str]]) -> tuple[np.ndarray, str] | None:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None

    class Words:
        """What RougeScorer takes for a tokenizer."""

        def tokenize(self, text: str) -> list[str]:
            return rouge.TOKENIZERS[name](text)

    name = rouge.tokenizer_for(sets)
    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=None if name == "default" else Words())
    values = [scorer.score_multi(list(references), hypothesis)["rougeL"].fmeasure for hypothesis, *references in zip(hypotheses, *sets, strict=True)]
    return np.array(values, dtype=np.float64), f"rouge-score|{rouge.signature(len(sets), name)}|version:{_version('rouge-score')}"


def _bert_score(hypotheses: list[str], sets: list[list[str]]) -> tuple[np.ndarray, str] | None:
    scorer = _bert_scorer(os.environ.get("CVMK_BERTSCORE_MODEL", BERTSCORE_MODEL))
    if scorer is None:
        return None
    references = [list(group) for group in zip(*sets, strict=True)]
    f1 = scorer.score(hypotheses, references)[2]
    return np.asarray(f1.tolist(), dtype=np.float64), f"bert-score|nrefs:{len(sets)}|f1|{scorer.hash}"


@lru_cache(maxsize=1)
def _bert_scorer(model: str) -> Any | None:
    """bert-score's scorer, or None where the package or the model is missing; both answers are kept."""
    try:
        from bert_score import BERTScorer

        return BERTScorer(model_type=model)
    except (ImportError, OSError, ValueError, KeyError):  # what loading an absent or unknown model raises
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
