"""`cvmk bench mixers CONFIG.toml WORK`: models that differ in their mixers, trained alike, beside each other.

Each pattern of mixers (`A`, `MMMA`, or `A:S` for an encoder and a decoder of their own) has a folder in WORK with a run of `cvmk train`, and `result.json`
once it was measured (`_mixer_measures.py`). What is there is not done again: after Ctrl-C, or with more patterns, the same command goes on, a
training from its last checkpoint. The feed-forward layers of each model are as wide as gives it the parameters of the configuration's own model.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvmk.cli._mixer_plots import write_plots
from cvmk.config.loading import check_values, load_train_config
from cvmk.config.model import LETTERS, ModelConfig
from cvmk.config.overrides import apply_overrides, dumps
from cvmk.config.schema import TrainConfig
from cvmk.errors import ConfigError, DataError
from cvmk.files import read_json, read_text, write_json, write_text

PATTERNS = ("A", "M", "2", "S", "R", "W", "H", "MMMA", "MA", "A:S")
"""Every mixer alone, two hybrids on both sides, and the production student's recurrent decoder behind an encoder of attention."""
RESULT, RUN, SETTINGS, TABLE = "result.json", "run", "study.json", "study.md"
_SAMPLES = 1000


def sides(pattern: str) -> tuple[str, str]:
    """The letters of the encoder and of the decoder. Raises ConfigError for a pattern that has other letters, or none."""
    encoder, _, decoder = pattern.partition(":")
    decoder = decoder if ":" in pattern else encoder
    for letters in (encoder, decoder):
        if not letters or {*letters} - {*LETTERS}:
            known = ", ".join(f"{letter} {name}" for letter, name in LETTERS.items())
            raise ConfigError(f"--patterns {pattern} is no pattern of mixers: give letters, or ENCODER:DECODER; they are {known}")
    return encoder, decoder


def parameters_of(model: ModelConfig, vocabulary: int) -> int:
    """Of a model that is not made."""
    import torch

    from cvmk.nn import CVMTransformer

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CVMTransformer(model, vocabulary).parameters())


def of_equal_size(model: ModelConfig, wanted: int, vocabulary: int) -> ModelConfig:
    """The model with feed-forward layers, in steps of 8 units, that bring its parameters nearest to `wanted`; 8 units where it is too large without."""
    one, two = (parameters_of(model.model_copy(update={"ffn": ffn}), vocabulary) for ffn in (8, 16))
    return model.model_copy(update={"ffn": 8 * max(1, 1 + round((wanted - one) / (two - one)))})


class Study:
    """The trainings of one configuration. Raises ConfigError for a configuration that does not fit, and where `work` holds those of another."""

    def __init__(self, path: str, overrides: Sequence[str], work: Path, iterations: int) -> None:
        values = tomllib.loads(read_text(path))
        apply_overrides(values, overrides)
        values = {name: value for name, value in values.items() if name not in ("teacher", "distillation")}
        values.setdefault("training", {})["iterations"] = iterations
        values.setdefault("validation", {})["patience"] = 0
        values.setdefault("data", {}).setdefault("cache", str(work / "cache"))
        self.work, self._values, self._path = work, json.loads(json.dumps(values)), path
        self._config = check_values(TrainConfig, self._values, path)
        work.mkdir(parents=True, exist_ok=True)
        if (work / SETTINGS).exists() and read_json(work / SETTINGS) != self._values:
            raise ConfigError(f"{work} holds trainings of another configuration: choose another folder, or remove it")
        write_json(work / SETTINGS, self._values)

    def configuration(self, pattern: str, seed: int) -> dict[str, Any]:
        """Of one training."""
        values = json.loads(json.dumps(self._values))
        encoder, decoder = sides(pattern)
        model = self._config.model
        mixed = model.model_copy(update={"encoder_mixers": [LETTERS[x] for x in encoder], "decoder_mixers": [LETTERS[x] for x in decoder]})
        vocabulary = self._config.tokenizer.vocabulary
        ffn = of_equal_size(mixed, parameters_of(model, vocabulary), vocabulary).ffn
        values.setdefault("model", {}).update({"encoder_mixers": encoder, "decoder_mixers": decoder, "ffn": ffn})
        values.setdefault("run", {}).update({"folder": str(self.folder(pattern, seed) / RUN), "seed": seed})
        return dict(values)

    def folder(self, pattern: str, seed: int) -> Path:
        return self.work / f"{pattern.replace(':', '-')}-seed{seed}"

    def check(self, pattern: str) -> None:
        """Raise ConfigError where the training could not begin."""
        check_values(TrainConfig, self.configuration(pattern, 1), f"{self._path} with the mixers {pattern}")

    def result(self, pattern: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a training came to, from its folder where it is done."""
        folder = self.folder(pattern, seed)
        if not (folder / RESULT).exists():
            print(f"{folder.name} ...", file=sys.stderr, flush=True)
            folder.mkdir(exist_ok=True)
            write_text(folder / "config.toml", dumps(self.configuration(pattern, seed)))
            write_json(folder / RESULT, _measured(folder, options))
        found: dict[str, Any] = read_json(folder / RESULT)
        return found


def _measured(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Train `folder/config.toml`, from where it stopped, and measure the model. Raises DataError where there is nothing to measure it on."""
    from cvmk.cli import _mixer_measures as measures
    from cvmk.errors import DivergedError
    from cvmk.telemetry import reporter
    from cvmk.training import pipeline
    from cvmk.training.materials import load_corpora

    path = folder / "config.toml"
    config = load_train_config(path)
    try:
        report = pipeline.train(config, read_text(path), reporter(), resume=True)
    except DivergedError as error:
        return {"diverged": str(error)}
    corpora = load_corpora(config.data)
    corpus = corpora.test or corpora.valid
    if not corpus.sources:
        raise DataError(f"{corpus.name} has no sentences to translate: name another test set in the configuration")
    return {
        "diverged": None,
        "ffn": config.model.ffn,
        "parameters": report["parameters"],
        "tokens_per_second": report["throughput"]["target_tokens_per_second"],
        "environment": report["environment"],
        "set": corpus.name,
        "references": corpus.targets,
        **measures.of_text(folder / RUN / "model", corpus.sources, corpus.targets, options["streams"]),
        "costs": measures.costs(config.model, options["lengths"], options["steps"]),
    }


# -- tables ------------------------------------------------------------------------------------------------------------------------
def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _whole(found: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The results of trainings that did not diverge, of patterns that have any."""
    whole = {pattern: [one for one in results if one["diverged"] is None] for pattern, results in found.items()}
    return {pattern: results for pattern, results in whole.items() if results}


def tables(found: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Markdown of what patterns came to, by pattern one result a seed; differences are to the first of them, intervals bootstraps over sentences."""
    done = _whole(found)
    lines = [*_quality(done), "", *_robustness(done), "", *_costs(done)]
    failed = [f"{pattern}: {one['diverged']}" for pattern, results in found.items() for one in results if one["diverged"] is not None]
    return "\n".join([*lines, "", *failed]).strip() + "\n"


def _mean(results: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(one[key] for one in results)) / len(results)


def _quality(done: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    from cvmk.validation.bootstrap import interval_of, paired_of
    from cvmk.validation.metrics import measure

    heads = (
        *("mixers", "ffn", "parameters", "BLEU (95 %)", "beside the first (95 %)", "chrF", "training, tokens/s"),
        *("LAAL, words (wait-3)", "BLEU (wait-3)", "NE (retranslation)"),
    )
    lines, first = [_row(heads), _row(["---"] * len(heads))], None
    for pattern, results in done.items():
        # All seeds as one corpus: their translations one after the other, each beside the same references.
        said = [text for one in results for text in one["hypotheses"]]
        references = [text for one in results for text in one["references"]]
        bleu, chrf = (measure(metric, said, references) for metric in ("bleu", "chrf"))
        low, high = interval_of(bleu, _SAMPLES)
        difference = ""
        if first is None:
            first = bleu
        elif first.sentences == bleu.sentences:
            pair = paired_of(bleu, first, _SAMPLES)
            difference = f"{pair.difference:+.2f} ({pair.low:+.2f} to {pair.high:+.2f})"
        lines.append(_row((
            pattern, results[0]["ffn"], results[0]["parameters"], f"{bleu.score.value:.2f} ({low:.1f}–{high:.1f})", difference, f"{chrf.score.value:.2f}",
            f"{_mean(results, 'tokens_per_second'):.0f}", f"{_mean(results, 'laal'):.2f}", f"{_mean(results, 'wait_bleu'):.2f}",
            f"{_mean(results, 'erasure'):.3f}",
        )))  # fmt: skip
    return lines


def _robustness(done: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    names = list(next(iter(done.values()))[0]["noisy"]) if done else []
    lines = [_row(("BLEU of sources", *names)), _row(["---"] * (len(names) + 1))]
    for pattern, results in done.items():
        lines.append(_row((pattern, *(f"{sum(one['noisy'][name] for one in results) / len(results):.2f}" for name in names))))
    return lines


def _costs(done: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    lengths = list(next(iter(done.values()))[0]["costs"]) if done else []
    heads = ("decoding, by tokens of the source", *(f"{length}: ms a token" for length in lengths), *(f"{length}: bytes of state" for length in lengths))
    lines = [_row(heads), _row(["---"] * len(heads))]
    for pattern, results in done.items():
        costs = results[0]["costs"]
        lines.append(_row((pattern, *(f"{costs[length]['milliseconds']:.2f}" for length in lengths), *(costs[length]["bytes"] for length in lengths))))
    return lines


def run(path: str, work: Path, overrides: Sequence[str], patterns: Sequence[str], iterations: int, seeds: Sequence[int], options: Mapping[str, Any]) -> str:
    """Train and measure what is not there yet; the tables, which are written to WORK/study.md too, after every model. Plots are drawn at the end."""
    study = Study(path, overrides, work, iterations)
    for pattern in patterns:
        study.check(pattern)
    found: dict[str, list[dict[str, Any]]] = {}
    text = ""
    for seed in seeds:
        for pattern in patterns:
            found.setdefault(pattern, []).append(study.result(pattern, seed, options))
            text = tables(found)
            write_text(work / TABLE, text)
    if (why := write_plots(_whole(found), work)) is not None:
        print(why, file=sys.stderr)
    return text
