"""Everything that a report says, as figures: read from the folders of runs, compared, and judged by rules. Pages and JSON are made of it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvmk import __version__
from cvmk.errors import ConfigError, DataError
from cvmk.files import read_json
from cvmk.report.advice import Advice, View, advise, advise_searches
from cvmk.report.comparison import SetScores, compare, verdict
from cvmk.report.differences import Sample, chosen, recorded_samples
from cvmk.report.evaluations import SETS
from cvmk.report.history import BoundedCurve
from cvmk.report.run import QuantizedModel, Run, is_run, pick, read_folders
from cvmk.report.search import Search, with_trials
from cvmk.report.settings import flat

SAMPLES = 8
_SYSTEMS_SHOWN = 6
"""Systems whose translations stand beside each other."""


@dataclass
class Figures:
    runs: list[Run]
    baseline: Run | None
    scores: list[SetScores]
    samples: list[Sample]
    models: list[QuantizedModel]
    benchmarks: list[tuple[str, dict[str, Any]]]
    """Files of timings, by name."""
    advice: list[Advice]
    problems: list[str]
    searches: list[Search] = field(default_factory=list)
    """Whose best trials are among the runs."""
    bootstrap: int = 1000
    confidence: float = 0.95
    cvmk: str = field(default=__version__)

    def of(self, run: Run) -> list[SetScores]:
        return [scores for scores in self.scores if scores.system == run.name and not scores.is_teacher]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; numbers that are not finite are null."""
        found: dict[str, Any] = _plain({
            "cvmk": self.cvmk,
            "baseline": None if self.baseline is None else self.baseline.name,
            "bootstrap": self.bootstrap,
            "confidence": self.confidence,
            "runs": [_run_json(run) for run in self.runs],
            "searches": [search.to_json() for search in self.searches],
            "scores": [_scores_json(scores) for scores in self.scores],
            "samples": [dataclasses.asdict(sample) for sample in self.samples],
            "quantized": [{"path": str(model.path), "report": model.report} for model in self.models],
            "benchmarks": [{"file": name, "figures": values} for name, values in self.benchmarks],
            "recommendations": [dataclasses.asdict(advice) for advice in self.advice],
            "problems": self.problems,
        })  # fmt: skip
        return found


def figures_of(
    folders: Sequence[str | os.PathLike[str]],
    *,
    baseline: str | os.PathLike[str] | None = None,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    benchmarks: Sequence[str | os.PathLike[str]] = (),
    as_recorded: Collection[str] = (),
) -> Figures:
    """Read runs and quantised models, and compare each run with the baseline (default: the first run, where there are several) and with its teacher.

    The folder of a search stands for its best trials, the best first.

    bootstrap, confidence   of intervals and paired tests.
    benchmarks              JSON files of `cvmk bench --json` or of benchmarks/.
    as_recorded             metrics that are not computed anew, and so have no interval where the run recorded none.

    Raises DataError for a folder that is no run and for a file of benchmarks that cannot be read, ConfigError for too many runs and a baseline that is none.
    """
    if baseline is not None and not is_run(Path(baseline)):
        raise ConfigError(f"--baseline {os.fspath(baseline)} is no run of cvmk train: name the folder of one")
    paths, searches = with_trials([*([] if baseline is None else [baseline]), *folders])
    runs, models, problems = read_folders(paths)
    problems += [problem for search in searches for problem in search.problems]
    against = runs[0] if len(runs) > 1 else None
    scores = compare(runs, against, bootstrap, confidence, as_recorded)
    timings = [_benchmark(path) for path in benchmarks]
    figures = Figures(runs, against, scores, _samples(runs, scores), models, timings, [], problems, searches, bootstrap, confidence)
    rivals = {os.path.realpath(path) for search in searches for path in search.rivals()[1:]}
    views = [View(run, figures.of(run), is_rival=os.path.realpath(run.path) in rivals) for run in runs]
    figures.advice += advise_searches(searches) + advise(views, models)
    return figures


def _samples(runs: Sequence[Run], scores: Sequence[SetScores]) -> list[Sample]:
    """Of the test set where the first run has one, else of the validation set: of the runs that were scored on the same."""
    for name in reversed(SETS):
        first = next((run for run in runs if name in run.evaluations), None)
        if first is None:
            continue
        evaluation = first.evaluations[name]
        beside = [run for run in runs if name in run.evaluations and run.evaluations[name].same_set(evaluation)][:_SYSTEMS_SHOWN]
        teacher = next((one.system for one in scores if one.is_teacher and one.set == name and one.system == f"teacher of {first.name}"), None)
        return chosen(evaluation, name, [(run.name, run.evaluations[name].hypotheses) for run in beside], teacher, SAMPLES)
    return [sample for run in runs[:1] for name in reversed(SETS) for sample in recorded_samples(run.name, name, run.recorded(name))][:SAMPLES]


def _benchmark(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    found = read_json(path)
    rows = pick(found, "rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} holds no benchmarks: give what cvmk bench --json or benchmarks/ wrote")
    return os.path.basename(path), found


# -- JSON ----------------------------------------------------------------------------------------------------------------------
def _run_json(run: Run) -> dict[str, Any]:
    history = run.history
    return {
        "name": run.name,
        "path": str(run.path),
        "configuration": dict(flat(run.config)),
        "environment": run.environment,
        "iterations": pick(run.report, "iterations") or history.step,
        "finished": bool(run.report),
        "parameters": pick(run.report, "parameters") or history.parameters,
        "throughput": pick(run.report, "throughput"),
        "weights": pick(run.report, "weights"),
        "events": dict(history.counts),
        "notes": history.notes,
        "curves": {name: _curve_json(curve) for name, curve in history.curves.items() if curve.bins},
        "problems": run.problems,
    }


def _curve_json(curve: BoundedCurve) -> list[list[Any]]:
    """[first iteration, last iteration, mean, low, high] a bin, to six digits."""
    return [[point.first, point.last, *(float(f"{value:.6g}") for value in (point.mean, point.low, point.high))] for point in curve.bins]


def _scores_json(scores: SetScores) -> dict[str, Any]:
    found = dataclasses.asdict(scores)
    for name in ("baseline", "teacher"):
        comparison = getattr(scores, name)
        if comparison is not None:
            found[name]["pairs"] = [pair.to_dict() | {"verdict": verdict(pair)} for pair in comparison.pairs]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
