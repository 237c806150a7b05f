"""Optimisers beside each other: `python benchmarks/optimizer_study.py CONFIG.toml WORK` trains with each of them and prints tables in Markdown.

CONFIG.toml is one of `cvmk train`; its teacher and its own optimiser are left out, and `--set` changes the rest. For each optimiser the learning rate
is searched in the same way: `--rates` trainings of `--search-iterations`, from a usual peak in steps of 2 towards the better side and then between the best
ones, judged by the metric on the validation set. Trainings of `--iterations` at the best rate follow, with the `--seeds`, which no search has seen. Their
greedy translations of the test set give the scores; intervals and differences (to the first optimiser) are bootstraps over sentences, all seeds of a
sentence together. Speed is that of the trainings, memory the most that their process held; both mean something only where nothing else runs.

Each training has a folder in WORK and a process of its own. What is there already is not done again: after Ctrl-C, or with more seeds or optimisers, the
same command goes on. `--optimizers` takes names, and `sam:lion` for one around another.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvmk.config.loading import check_values
from cvmk.config.overrides import apply_overrides, dumps
from cvmk.config.schema import TrainConfig, check_packages
from cvmk.errors import ConfigError, CvmkError, DataError
from cvmk.files import read_json, read_text, write_json, write_text
from cvmk.hardware import keep_freed_memory

PEAKS = {"adamw": 4e-3, "lion": 4e-4, "adafactor": 4e-3, "muon": 4e-3, "schedule_free_adamw": 8e-3}
"""Where the search begins, for the small models of this repository; around another optimiser it is that one's."""
OPTIMIZERS = [*PEAKS, "sam", "asam"]
RESULT, RUN, SETTINGS = "result.json", "run", "study.json"
_SAMPLES = 1000


def peak(optimizer: str) -> float:
    """Where its search begins; of a name that the schema will refuse, anywhere."""
    name, _, base = optimizer.partition(":")
    return PEAKS.get(name) or PEAKS.get(base) or PEAKS["adamw"]


def next_rate(tried: Mapping[float, float], start: float) -> float:
    """The learning rate to try next, where these gave these scores: first `start`, half of it and twice it; then further on the side of the best, while
    that is at an end; then between it and its better neighbour. A score that is no number is worse than any."""
    for rate in (start, start / 2, start * 2):
        if rate not in tried:
            return rate
    scores = {rate: value if math.isfinite(value) else -math.inf for rate, value in tried.items()}
    rates = sorted(scores)
    best = max(rates, key=lambda rate: scores[rate])
    at = rates.index(best)
    if at in (0, len(rates) - 1):
        return best / 2 if at == 0 else best * 2
    return _rounded(math.sqrt(best * max(rates[at - 1], rates[at + 1], key=lambda rate: scores[rate])))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


class Study:
    """The trainings of one configuration, each done once. Raises ConfigError where `work` holds those of another."""

    def __init__(self, values: dict[str, Any], work: Path, say: Any = print) -> None:
        self.work, self._say = work, say
        self._values = {name: value for name, value in values.items() if name not in ("teacher", "distillation", "optimizer")}
        work.mkdir(parents=True, exist_ok=True)
        if (work / SETTINGS).exists() and read_json(work / SETTINGS) != json.loads(json.dumps(self._values)):
            raise ConfigError(f"{work} holds trainings of another configuration: choose another folder, or remove it")
        write_json(work / SETTINGS, self._values)

    def result(self, optimizer: str, rate: float, seed: int, iterations: int) -> dict[str, Any]:
        """What a training came to, from its folder where it is done."""
        folder = self.work / f"{optimizer.replace(':', '-')}-{rate:g}-seed{seed}-{iterations}"
        if not (folder / RESULT).exists():
            self._say(f"{folder.name} ...", file=sys.stderr, flush=True)
            folder.mkdir(exist_ok=True)
            write_text(folder / "config.toml", dumps(self._configuration(optimizer, rate, seed, iterations, folder)))
            code = in_a_process(folder)
            if code in (130, -signal.SIGINT):
                raise KeyboardInterrupt
            if code:
                raise DataError(f"the training in {folder} ended with exit code {code}; what it said is above")
        found: dict[str, Any] = read_json(folder / RESULT)
        return found

    def _configuration(self, optimizer: str, rate: float, seed: int, iterations: int, folder: Path) -> dict[str, Any]:
        """Rollbacks would change the learning rate, and patience the budget: there are none."""
        values = json.loads(json.dumps(self._values))
        name, _, base = optimizer.partition(":")
        values["optimizer"] = {"name": name, "learning_rate": rate} | ({"base": base} if base else {})
        if "schedule_free" in optimizer:
            values["schedule"] = {key: value for key, value in values.get("schedule", {}).items() if key in ("warmup", "final_factor")}
        values.setdefault("data", {}).setdefault("cache", str(self.work / "cache"))
        for table, more in (
            ("run", {"folder": str(folder / RUN), "seed": seed}),
            ("training", {"iterations": iterations}),
            ("validation", {"patience": 0}),
            ("guard", {"max_rollbacks": 0, "rollback_on_regression": False}),
        ):
            values.setdefault(table, {}).update(more)
        return values

    def check(self, optimizer: str, name: str) -> None:
        """Raise ConfigError where a training could not begin."""
        check_packages(check_values(TrainConfig, self._configuration(optimizer, peak(optimizer), 1, 1, self.work), name))

    def search(self, optimizer: str, trials: int, iterations: int, seed: int) -> dict[float, float]:
        """The validation score of each learning rate that was tried."""
        tried: dict[float, float] = {}
        while len(tried) < trials:
            rate = next_rate(tried, peak(optimizer))
            found = self.result(optimizer, rate, seed, iterations)
            tried[rate] = -math.inf if found["diverged"] else found["validation"]
        return tried


def in_a_process(folder: Path) -> int:
    """`train` in one of its own; its exit code."""
    return subprocess.run([sys.executable, __file__, "--train", str(folder)], stdout=subprocess.DEVNULL).returncode


def train(folder: Path) -> None:
    """In a process of its own: the training of `folder/config.toml`, from where it stopped, and what came of it."""
    import torch

    from cvmk.config.loading import load_train_config
    from cvmk.errors import DivergedError
    from cvmk.files import followed
    from cvmk.inference import Translator
    from cvmk.telemetry import reporter
    from cvmk.training import pipeline
    from cvmk.training.report import REPORT
    from cvmk.training.trainer import Interrupted

    path = folder / "config.toml"
    config = load_train_config(path)
    diverged = None
    try:
        pipeline.train(config, read_text(path), reporter(), resume=True)
    except DivergedError as error:
        diverged = str(error)
    except Interrupted:
        raise SystemExit(130) from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    report = read_json(folder / RUN / REPORT) if (folder / RUN / REPORT).exists() else None
    if report is None:  # it had not been validated once
        write_json(folder / RESULT, {"diverged": diverged, "validation": None})
        return
    state = torch.load(followed(folder / RUN / "checkpoints" / "last") / "state.pt", weights_only=True)["optimizer"]
    corpora = pipeline.load_corpora(config.data)
    corpus = corpora.test or corpora.valid
    said = [one.text for one in Translator(folder / RUN / "model").translate(corpus.sources, on_long="truncate")]
    write_json(folder / RESULT, {
        "diverged": diverged, "validation": report["validation"]["value"], "metric": report["validation"]["metric"], "set": corpus.name,
        "loss": report["losses"]["last"]["loss"], "throughput": report["throughput"], "state_bytes_per_parameter": state_bytes(state) / report["parameters"],
        "peak_bytes": peak, "hypotheses": said, "references": corpus.targets, "environment": report["environment"],
    })  # fmt: skip


def state_bytes(state: Any) -> int:
    """Of an optimiser's tensors. Of schedule-free's two sets of weights one is the model's."""
    if isinstance(state, dict):
        return sum(state_bytes(value) for name, value in state.items() if name != "training_weights")
    if isinstance(state, (list, tuple)):
        return sum(map(state_bytes, state))
    return state.numel() * state.element_size() if hasattr(state, "element_size") else 0


def pooled(metric: str, results: Sequence[Mapping[str, Any]]) -> Any:
    """The measurement of several systems' translations of the same sentences as of one corpus, a sentence of all of them being one."""
    from cvmk.validation.metrics import Measurement, measure

    parts = [measure(metric, found["hypotheses"], found["references"]) for found in results]
    statistics = sum(part.statistics for part in parts)
    value = float(parts[0].combine(statistics.sum(axis=0)))
    return Measurement(dataclasses.replace(parts[0].score, value=value), parts[0].sentences, lambda: statistics)


def score_rows(finals: Mapping[str, tuple[float, list[dict[str, Any]]]]) -> list[tuple[str, ...]]:
    """The table: optimiser, best rate, scores with intervals, differences to the first, speed, memory."""
    from cvmk.validation.bootstrap import interval_of, paired_of

    scores = ("validation", "BLEU (95 %)", "by seed", "beside the first (95 %)", "chrF", "loss")
    heads = ("optimiser", "learning rate", *scores, "tokens/s", "state, bytes/parameter", "peak, MB")
    rows: list[tuple[str, ...]] = [heads, ("---",) * len(heads)]
    first: Any = None
    for name, (rate, results) in finals.items():
        whole = [found for found in results if found["validation"] is not None]
        if not whole or any(found["diverged"] for found in results):
            rows.append((name, f"{rate:g}", "diverged", *[""] * (len(heads) - 3)))
            continue
        bleu, chrf = (pooled(metric, whole) for metric in ("bleu", "chrf"))
        low, high = interval_of(bleu, _SAMPLES)
        difference = ""
        if first is None:
            first = bleu
        else:
            pair = paired_of(bleu, first, _SAMPLES)
            difference = f"{pair.difference:+.2f} ({pair.low:+.2f} to {pair.high:+.2f})"

        def mean(key: Any, whole: Sequence[dict[str, Any]] = whole) -> float:
            return float(sum(map(key, whole))) / len(whole)

        rows.append((
            name, f"{rate:g}", f"{mean(lambda found: found['validation']):.2f}", f"{bleu.score.value:.2f} ({low:.1f}–{high:.1f})",
            ", ".join(f"{pooled('bleu', [found]).score.value:.2f}" for found in whole), difference, f"{chrf.score.value:.2f}",
            f"{mean(lambda found: found['loss']):.3f}", f"{mean(lambda found: found['throughput']['target_tokens_per_second']):.0f}",
            f"{mean(lambda found: found['state_bytes_per_parameter']):.1f}", f"{max(found['peak_bytes'] for found in whole) / 1e6:.0f}",
        ))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("work", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--search-iterations", type=int, help="default: --iterations")
    parser.add_argument("--rates", type=int, default=5, help="learning rates that are tried for each optimiser")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--search-seed", type=int, default=1)
    arguments = parser.parse_args()
    values = tomllib.loads(read_text(arguments.config))
    apply_overrides(values, arguments.overrides)
    study = Study(values, arguments.work)
    for name in arguments.optimizers:
        study.check(name, arguments.config)
    searched, finals = {}, {}
    for name in arguments.optimizers:
        searched[name] = study.search(name, arguments.rates, arguments.search_iterations or arguments.iterations, arguments.search_seed)
        best = max(searched[name], key=lambda rate: searched[name][rate])
        finals[name] = best, [study.result(name, best, seed, arguments.iterations) for seed in arguments.seeds]
    for row in score_rows(finals):
        print("| " + " | ".join(row) + " |")
    print("\nvalidation score by learning rate:")
    for name, tried in searched.items():
        print(f"- {name}: " + ", ".join(f"{rate:g} {'diverged' if value == -math.inf else f'{value:.2f}'}" for rate, value in sorted(tried.items())))


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--train"]:
            keep_freed_memory()
            train(Path(sys.argv[2]))
        else:
            main()
    except CvmkError as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from None
