"""`cvmk bench mixers CONFIG.toml WORK`: models that differ in their mixers, trained alike, beside each other.

Each pattern of mixers (`A`, `MMMA`, `A:S` for an encoder and a decoder of their own, `causal-M` for an encoder that reads from left to right) has a folder in
WORK with a run of `cvmk train`, and `result.json` once its quality was measured (`_mixer_measures.py`). Costs of all patterns stand in WORK/costs.json
(`_mixer_costs.py`). What is there is not done again: after Ctrl-C, or with more patterns, the same command goes on, a training from its last checkpoint.
The feed-forward layers of each model are as wide as gives it the parameters of the configuration's own model.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cvmk.cli._mixer_plots import write_plots
from cvmk.cli._mixer_tables import tables, whole
from cvmk.config.loading import check_values, load_train_config
from cvmk.config.model import LETTERS, ModelConfig
from cvmk.config.overrides import apply_overrides, dumps
from cvmk.config.schema import TrainConfig
from cvmk.errors import ConfigError, DataError
from cvmk.files import read_json, read_text, write_json, write_text

PATTERNS = ("A", "M", "2", "S", "R", "W", "H", "MMMA", "MA", "A:S")
"""Every mixer alone, two hybrids on both sides, and the production student's recurrent decoder behind an encoder of attention."""
RESULT, COSTS, RUN, SETTINGS, TABLE = "result.json", "costs.json", "run", "study.json", "study.md"
_CAUSAL = "causal-"


class Sides(NamedTuple):
    """The letters of the encoder and of the decoder, and whether the encoder is causal."""

    encoder: str
    decoder: str
    causal: bool


def sides(pattern: str) -> Sides:
    """What a pattern says. Raises ConfigError for one that has other letters, or none."""
    encoder, colon, decoder = pattern.removeprefix(_CAUSAL).partition(":")
    found = Sides(encoder, decoder if colon else encoder, pattern.startswith(_CAUSAL))
    for letters in found[:2]:
        if not letters or {*letters} - {*LETTERS}:
            known = ", ".join(f"{letter} {name}" for letter, name in LETTERS.items())
            raise ConfigError(f"--patterns {pattern} is no pattern of mixers: give letters, or ENCODER:DECODER, or {_CAUSAL} and these; letters are {known}")
    return found


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
        self.config = check_values(TrainConfig, self._values, path)
        work.mkdir(parents=True, exist_ok=True)
        if (work / SETTINGS).exists() and read_json(work / SETTINGS) != self._values:
            raise ConfigError(f"{work} holds trainings of another configuration: choose another folder, or remove it")
        write_json(work / SETTINGS, self._values)

    def configuration(self, pattern: str, seed: int) -> dict[str, Any]:
        """Of one training."""
        values = json.loads(json.dumps(self._values))
        encoder, decoder, causal = sides(pattern)
        given = {"encoder_mixers": encoder, "decoder_mixers": decoder} | ({"encoder_direction": "causal"} if causal else {})
        model = self.config.model
        spelled = given | {"encoder_mixers": [LETTERS[letter] for letter in encoder], "decoder_mixers": [LETTERS[letter] for letter in decoder]}
        vocabulary = self.config.tokenizer.vocabulary
        ffn = of_equal_size(model.model_copy(update=spelled), parameters_of(model, vocabulary), vocabulary).ffn
        values.setdefault("model", {}).update(given | {"ffn": ffn})
        values.setdefault("run", {}).update({"folder": str(self.folder(pattern, seed) / RUN), "seed": seed})
        return dict(values)

    def folder(self, pattern: str, seed: int) -> Path:
        return self.work / f"{pattern.replace(':', '-')}-seed{seed}"

    def checked(self, pattern: str, seed: int = 1) -> TrainConfig:
        """The same. Raises ConfigError where the training could not begin."""
        return check_values(TrainConfig, self.configuration(pattern, seed), f"{self._path} with the mixers {pattern}")

    def result(self, pattern: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a training came to, from its folder where it is done."""
        folder = self.folder(pattern, seed)
        if (folder / RESULT).exists() and _is_whole(found := read_json(folder / RESULT), options):
            return dict(found)
        print(f"{folder.name} ...", file=sys.stderr, flush=True)
        folder.mkdir(exist_ok=True)
        write_text(folder / "config.toml", dumps(self.configuration(pattern, seed)))
        result = _measured(folder, options)
        write_json(folder / RESULT, result)
        return result

    def costs(self, trained: Mapping[str, int], options: Mapping[str, Any], *, again: bool) -> dict[str, Any]:
        """What patterns cost, each named with the seed of a training that has come to its end: from WORK/costs.json, where all of them are there and were
        measured with these options; else they are measured anew beside each other, with those that are there."""
        path = self.work / COSTS
        before = read_json(path) if path.exists() else {"decoding": {}}
        if again or {*trained} - {*before["decoding"]} or before.get("options") != _of_costs(options):
            print("costs ...", file=sys.stderr, flush=True)
            before = _costs(self, dict.fromkeys([*before["decoding"], *trained]), *next(iter(trained.items())), options)
            write_json(path, before)
        return dict(before)


def _is_whole(result: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether a result is of what is measured now; an older cvmk measured less."""
    return result["diverged"] is not None or ("stability" in result and result.get("streams") == options["streams"])


def _measured(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Train `folder/config.toml`, from where it stopped, and measure the model. Raises DataError where there is nothing to measure it on."""
    from cvmk.cli import _mixer_measures as measures
    from cvmk.errors import DivergedError
    from cvmk.training.materials import load_corpora

    config = load_train_config(folder / "config.toml")
    try:
        report = _trained(folder, config)
    except DivergedError as error:
        return {"diverged": str(error)}
    if report["diverged"]:
        return {"diverged": report["diverged"]}
    corpora = load_corpora(config.data)
    corpus = corpora.test or corpora.valid
    if not corpus.sources:
        raise DataError(f"{corpus.name} has no sentences to translate: name another test set in the configuration")
    return {
        "diverged": None,
        "ffn": config.model.ffn,
        "parameters": report["parameters"],
        "environment": report["environment"],
        "set": corpus.name,
        "references": corpus.targets,
        "streams": options["streams"],
        **measures.of_text(folder / RUN / "model", corpus.sources, corpus.targets, options["streams"], config.run.threads or None),
    }


def _trained(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """The report of the training in `folder`, which is read where the training is finished: a finished run that is resumed translates its sets once more."""
    from cvmk.telemetry import reporter
    from cvmk.training import pipeline
    from cvmk.training.report import REPORT

    text, run = read_text(folder / "config.toml"), folder / RUN
    if (run / REPORT).exists() and tomllib.loads(read_text(run / "config.toml")) == tomllib.loads(text):
        return dict(read_json(run / REPORT))
    return pipeline.train(config, text, reporter(), resume=True)


def _of_costs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that costs depend on."""
    return {name: options[name] for name in ("lengths", "steps", "seconds")}


def _costs(study: Study, patterns: Iterable[str], trained: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure them, on the text and with the tokenizer of one that was trained."""
    import torch

    from cvmk.cli import _mixer_costs as measures
    from cvmk.telemetry import environment
    from cvmk.text.cache import tokenized
    from cvmk.text.tokenizers import load_tokenizer
    from cvmk.training.materials import load_corpora

    if study.config.run.threads:
        torch.set_num_threads(study.config.run.threads)
    configs, data = {pattern: study.checked(pattern) for pattern in patterns}, study.config.data
    tokenizer = load_tokenizer(study.folder(trained, seed) / RUN / "model")
    corpus = tokenized(load_corpora(data).train, tokenizer, str(data.cache), data.max_tokens_per_sentence, data.max_length_ratio, data.on_bad_line)
    return {
        "options": _of_costs(options),
        "environment": environment() | {"threads": torch.get_num_threads()},
        "training": measures.training(configs, corpus, tokenizer, options["seconds"]),
        "decoding": measures.decoding({pattern: one.model for pattern, one in configs.items()}, options["lengths"], options["steps"]),
    }


def run(
    path: str,
    work: Path,
    overrides: Sequence[str],
    patterns: Sequence[str],
    iterations: int,
    seeds: Sequence[int],
    options: Mapping[str, Any],
    *,
    costs_again: bool = False,
) -> str:
    """Train and measure what is not there yet; the tables, which are written to WORK/study.md too, after every model. Costs are measured last, and again with
    `costs_again`; then plots are drawn."""
    patterns, seeds = [*dict.fromkeys(patterns)], [*dict.fromkeys(seeds)]
    study = Study(path, overrides, work, iterations)
    for pattern in patterns:
        study.checked(pattern)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        for pattern in patterns:
            found.setdefault(pattern, []).append(study.result(pattern, seed, options))
            write_text(work / TABLE, tables(found, None))
    trained = {pattern: seeds[[one["diverged"] for one in found[pattern]].index(None)] for pattern in whole(found)}
    costs = study.costs(trained, options, again=costs_again) if trained else None
    text = tables(found, costs)
    write_text(work / TABLE, text)
    if costs is not None and (why := write_plots(whole(found), costs, work)) is not None:
        print(why, file=sys.stderr)
    return text
