"""What a report knows of a run: everything that its folder says, and a sentence for everything that it does not."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvmk.config.data import DataConfig
from cvmk.errors import ConfigError, CvmkError, DataError
from cvmk.files import read_bytes, read_json
from cvmk.report.evaluations import SETS, Evaluation, read_evaluation
from cvmk.report.history import History
from cvmk.report.names import CONTENTS, ENVIRONMENT, EVALUATIONS, HYPOTHESES, QUANTIZATION, RESOLVED, TEACHER, TRAINING_REPORT
from cvmk.report.search import is_search
from cvmk.telemetry import EventReader
from cvmk.telemetry.events import EVENTS
from cvmk.telemetry.schema import Iterations, Start, Step, Validation

MOST_RUNS = 100


@dataclass
class Run:
    """A run of `cvmk train`, finished or not."""

    path: Path
    name: str = ""
    """A short name that no other run of the report has."""
    config: dict[str, Any] = field(default_factory=dict)
    """As config.resolved.json has it; empty where there is none."""
    environment: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    """Its training_report.json; empty as long as the run is not finished."""
    history: History = field(default_factory=History)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """By set: "validation", "test"."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why there is no evaluation of a set, where the run was scored on it."""
    problems: list[str] = field(default_factory=list)

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of "section.key"."""
        return pick(self.config, *key.split("."), default=default)

    def recorded(self, name: str) -> dict[str, Any]:
        """The scores of a set as the run has recorded them: those of the final weights, else of the best validation so far; {} where there are none."""
        found = pick(self.report, name)
        if not isinstance(found, dict) and name == "validation" and self.history.best_validation is not None:
            found = self.history.best_validation.values()
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class QuantizedModel:
    """What `cvmk quantize` wrote of a model that it made."""

    path: Path
    report: dict[str, Any]


def pick(value: Any, *keys: str, default: Any = None) -> Any:
    """value[key][key]...; `default` where something of it is missing, or no table, or the value found is of another kind than `default`."""
    for key in keys:
        if not isinstance(value, dict) or value.get(key) is None:
            return default
        value = value[key]
    kind = (int, float) if isinstance(default, (int, float)) else object if default is None else type(default)
    return value if isinstance(value, kind) else default


def read_folders(folders: Sequence[Path]) -> tuple[list[Run], list[QuantizedModel], list[str]]:
    """The runs and the quantised models in these folders (and models quantised into a run's folder), and what could not be read of the latter.

    Raises DataError for a folder that is neither, ConfigError for too many.
    """
    paths = list({os.path.realpath(folder): folder for folder in folders}.values())
    if len(paths) > MOST_RUNS:
        raise ConfigError(f"{len(paths)} runs are too many for one report: name at most {MOST_RUNS}")
    runs, models, problems = [], [], []
    for path in paths:
        if is_run(path):
            runs.append(read_run(path))
            _check_is_training(runs[-1])
        elif not (path / QUANTIZATION).is_file():
            raise DataError(_no_run(path))
        places = [path, *(sorted(entry for entry in path.iterdir() if entry.is_dir()))]
        for place in places:
            if (place / QUANTIZATION).is_file():
                found, problem = _table(place / QUANTIZATION)
                if problem is None:
                    models.append(QuantizedModel(place, found))
                else:
                    problems.append(problem)
    for run, name in zip(runs, _names([run.path for run in runs]), strict=True):
        run.name = name
    return runs, models, problems


def is_run(path: Path) -> bool:
    return not is_search(path) and any((path / name).is_file() for name in (RESOLVED, EVENTS, TRAINING_REPORT))


def _no_run(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist: name the folder of a run"
    if not path.is_dir():
        return f"{path} is a file: name the folder of a run"
    return f"{path} holds no run of cvmk train and no model of cvmk quantize: name a folder with {RESOLVED} or {QUANTIZATION}"


def _check_is_training(run: Run) -> None:
    """A service, a validation and a quantisation write logs, too. Raises DataError for one of those."""
    told = run.history.counts
    if told and not run.config and not run.report and not any(told[event.KIND] for event in (Start, Step, Iterations, Validation)):
        first = next(iter(told))
        raise DataError(f"{run.path} is the log of something else than a training (its first event is {first!r}): cvmk dashboard {run.path} shows it")


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return [name.replace("//", "/") for name in names] if parts else []


def read_run(path: Path) -> Run:
    """Whatever of a run is there; what cannot be read is in `problems`."""
    run = Run(path)
    run.config = _config(run)
    run.report = _file(run, TRAINING_REPORT)
    run.environment = pick(run.report, "environment", default={}) or _file(run, ENVIRONMENT)
    if (path / EVENTS).exists():
        with _told(run):
            reader = EventReader(path / EVENTS)
            run.history = History.of(reader.records(), _whole(run.setting("schedule.warmup")), _real(run.setting("training.clip_norm")))
            run.problems += reader.problems()
    else:
        run.problems.append(f"{path} has no {EVENTS}: there are no curves")
    for name in SETS:
        _evaluation(run, name)
    return run


def _config(run: Run) -> dict[str, Any]:
    """The run's own configuration; that of a teacher trained in a run's folder is the table of the run's."""
    if (run.path / RESOLVED).exists() or run.path.name != TEACHER or not (run.path.parent / RESOLVED).exists():
        return _file(run, RESOLVED)
    whole, _ = _table(run.path.parent / RESOLVED)
    own = pick(whole, TEACHER, default={})
    return {**own, **{name: whole[name] for name in ("run", "data", "tokenizer") if name in whole}}


def _file(run: Run, name: str) -> dict[str, Any]:
    if not (run.path / name).exists():
        return {}
    found, problem = _table(run.path / name)
    if problem is not None:
        run.problems.append(problem)
    return found


def _table(path: Path) -> tuple[dict[str, Any], str | None]:
    """The object in a JSON file, or why there is none."""
    try:
        found = read_json(path)
    except DataError as error:
        return {}, f"{error}; it is left out"
    return (found, None) if isinstance(found, dict) else ({}, f"{path} is no JSON object; it is left out")


@contextlib.contextmanager
def _told(run: Run) -> Iterator[None]:
    try:
        yield
    except CvmkError as error:
        run.problems.append(f"{error}; it is left out")


# -- sentences ---------------------------------------------------------------------------------------------------------------
def _evaluation(run: Run, name: str) -> None:
    """What the run was scored on: as it kept it, or else (an older cvmk, a run that is not finished) from its data as long as that is what it was."""
    path = run.path / EVALUATIONS / f"{name}.jsonl"
    try:
        if path.exists() and run.report:
            run.evaluations[name] = read_evaluation(path)
        elif name == "validation" and run.recorded(name):
            run.evaluations[name] = _rebuilt(run)
        elif run.recorded(name):
            run.missing[name] = f"{run.path} does not hold its translations of the {name} set, for it was written by an older cvmk"
    except CvmkError as error:
        run.missing[name] = str(error)


def _rebuilt(run: Run) -> Evaluation:
    """The validation set as the configuration names it, if its checksum is that of then, with the translations of the weights that were chosen."""
    step = _chosen(run)
    path = run.path / HYPOTHESES / f"step-{step}.txt"
    if step is None or not path.exists():
        raise DataError(f"{run.path} does not hold the translations of its final weights, because it was written by an older cvmk or is not finished")
    hypotheses = read_bytes(path).decode("utf-8", "replace").split("\n")[:-1]
    sources, references = _validation_set(run)
    most = _whole(run.setting("validation.max_sentences"), len(sources))
    sources, references = sources[:most], references[:most]
    if len(hypotheses) != len(sources) or not sources:
        raise DataError(f"{path} has {len(hypotheses)} lines, and the validation set {len(sources)} sentences: they do not belong together")
    return Evaluation(tuple(sources), tuple(references), tuple(hypotheses), None, len(sources))


def _chosen(run: Run) -> int | None:
    """The iteration whose weights are the best so far; None where they are an average of several."""
    if run.report:
        found = re.fullmatch(r"checkpoint at iteration (\d+)", str(run.report.get("weights")))
        return int(found[1]) if found else None
    return None if run.history.best_validation is None else run.history.best_validation.step


def _validation_set(run: Run) -> tuple[list[str], list[str]]:
    from cvmk.text.corpus import read_corpus
    from cvmk.text.phrasebook import phrasebook

    try:
        data = DataConfig(**run.setting("data", {}))
    except ValueError as error:
        raise DataError(f"{run.path / RESOLVED} names its data in a way that this cvmk does not know") from error
    if data.embedded is None and data.valid is None:
        raise DataError(f"{run.path / RESOLVED} names no validation set")
    corpus = phrasebook(data.phrasebook_pairs).valid if data.valid is None else read_corpus(data.valid, data, "data.valid", training=False)
    holder = run.path if (run.path / CONTENTS).exists() else run.path.parent
    contents, _ = _table(holder / CONTENTS)
    then = tuple(pick(contents, f"{corpus.name}.{side}", "sha256") for side in ("source", "target"))
    if then != corpus.fingerprints:
        raise DataError(f"{corpus.name} is no longer what {run.path} was validated on")
    return corpus.sources, corpus.targets


def _whole(value: Any, default: int = 0) -> int:
    return value if isinstance(value, int) else default


def _real(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
