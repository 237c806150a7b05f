"""What a report knows of a search for hyperparameters: its trials, as its events tell them, and what its last end left of them."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cvmk.errors import DataError
from cvmk.files import read_json
from cvmk.report.names import RESOLVED, SEARCH_REPORT, TRIALS
from cvmk.telemetry import EventReader, Record
from cvmk.telemetry.events import EVENTS
from cvmk.telemetry.schema import SearchEnded, SearchStarted, TrialEnded, TrialScored, TrialStarted

RIVALS = 8
"""Trials that stand for a search among the runs of a report."""
COMPLETE, RUNNING = "complete", "running"


@dataclass(frozen=True)
class Trial:
    number: int
    parameters: dict[str, Any] = field(default_factory=dict)
    """By configuration key."""
    state: str = RUNNING
    """"complete", "pruned", "failed", or "running" as long as nobody said otherwise."""
    value: float | None = None
    """The score that counts: of a complete trial its last, of others the best so far."""
    iterations: int | None = None
    seconds: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.number:04d}"


@dataclass
class Search:
    """A search of `cvmk search`, finished or not."""

    path: Path
    name: str = ""
    metric: str = "bleu"
    lower_is_better: bool = False
    space: dict[str, Any] = field(default_factory=dict)
    """By configuration key, what it may be, as the configuration says it."""
    trials: dict[int, Trial] = field(default_factory=dict)
    """By number; those of other machines as of the last time that this one's search ended."""
    importances: dict[str, float] = field(default_factory=dict)
    ended: str | None = None
    """Why it ended; None as long as it goes on."""
    problems: list[str] = field(default_factory=list)

    def ranked(self) -> list[Trial]:
        """Complete trials first, the best of each state before others; what has no score last."""
        sign = 1 if self.lower_is_better else -1
        return sorted(
            self.trials.values(), key=lambda one: (one.value is None, one.state != COMPLETE, sign * (one.value if one.value is not None else 0), one.number)
        )

    @property
    def best(self) -> Trial | None:
        """The best complete trial."""
        return next((trial for trial in self.ranked() if trial.state == COMPLETE and trial.value is not None), None)

    def is_better(self, value: float, than: float) -> bool:
        return value < than if self.lower_is_better else value > than

    def counts(self) -> dict[str, int]:
        """Trials by state."""
        return dict(Counter(trial.state for _, trial in sorted(self.trials.items())))

    def rivals(self) -> list[Path]:
        """The folders of its best complete trials, as long as there is none of whatever has a score; the best first."""
        ranked = [trial for trial in self.ranked() if trial.value is not None]
        found = [trial for trial in ranked if trial.state == COMPLETE] or ranked
        folders = [self.path / TRIALS / trial.name for trial in found]
        return [folder for folder in folders if (folder / RESOLVED).is_file()][:RIVALS]

    def to_json(self) -> dict[str, Any]:
        names = ("name", "metric", "lower_is_better", "space", "importances", "ended", "problems")
        trials = [asdict(trial) for _, trial in sorted(self.trials.items())]
        return {"path": str(self.path), **{name: getattr(self, name) for name in names}, "trials": trials}


def is_search(path: Path) -> bool:
    """Whether it is the folder of one, be it that it has not come to its first trial yet."""
    if (path / SEARCH_REPORT).is_file():
        return True
    if not (path / EVENTS).is_file() or (path / RESOLVED).exists():
        return False
    return (path / TRIALS).is_dir() or _begins_as_one(path / EVENTS)


def _begins_as_one(events: Path) -> bool:
    try:
        first = next(iter(EventReader(events).records()), None)
    except DataError:
        return False
    return first is not None and isinstance(first.event, SearchStarted)


def read_search(path: Path) -> Search:
    """Whatever of a search is there; what cannot be read is in `problems`."""
    search = Search(path, path.resolve().name)
    if (path / SEARCH_REPORT).exists():
        _last_end(search)
    try:
        reader = EventReader(path / EVENTS)
        for record in reader.records():
            _take(search, record)
        search.problems += reader.problems()
    except DataError as error:
        search.problems.append(f"{error}; it is left out")
    return search


def _last_end(search: Search) -> None:
    """What `search_report.json` says: of the trials of other machines, and of what matters."""
    path = search.path / SEARCH_REPORT
    try:
        found = read_json(path)
        search.metric, search.lower_is_better = str(found["metric"]), found["direction"] == "minimize"
        search.space = {str(key): dict(value) for key, value in found["space"].items()}
        search.importances = {str(key): float(value) for key, value in found["importances"].items()}
        for one in found["trials"]:
            number, parameters, ended = int(one["number"]), dict(one["parameters"]), (int(one["iterations"]), float(one["seconds"]), str(one["reason"]))
            search.trials[number] = Trial(number, parameters, str(one["state"]), _real(one["value"]), *ended)
        search.ended = str(found["reason"])
    except DataError as error:
        search.problems.append(f"{error}; it is left out")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        search.problems.append(f"{path} is no report of a search that this cvmk can read ({type(error).__name__}: {error}); it is left out")


def _take(search: Search, record: Record) -> None:
    event = record.event
    if isinstance(event, SearchStarted):
        search.metric, search.lower_is_better, search.space, search.ended = event.metric, event.direction == "minimize", dict(event.space), None
    elif isinstance(event, TrialStarted):
        before = search.trials.get(event.trial, Trial(event.trial))  # it goes on after an interruption
        search.trials[event.trial] = replace(before, parameters=dict(event.parameters), state=RUNNING, reason="")
    elif isinstance(event, TrialScored):
        trial = search.trials.get(event.trial, Trial(event.trial))
        better = event.best or trial.value is None
        search.trials[event.trial] = replace(trial, value=_real(event.value) if better else trial.value, iterations=event.step)
    elif isinstance(event, TrialEnded):
        trial = search.trials.get(event.trial, Trial(event.trial))
        value, step = _real(event.value), event.step if event.step is not None else trial.iterations
        search.trials[event.trial] = replace(trial, state=event.state, value=value, iterations=step, seconds=event.seconds, reason=event.reason)
    elif isinstance(event, SearchEnded):
        search.ended = event.reason or "it is finished"


def _real(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def with_trials(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], list[Search]]:
    """The folders, in place of each search those of its best trials; and the searches."""
    paths: list[Path] = []
    searches: dict[str, Search] = {}
    for path in map(Path, folders):
        if not is_search(path):
            paths.append(path)
        elif (real := os.path.realpath(path)) not in searches:
            searches[real] = read_search(path)
            paths += searches[real].rivals()
    return paths, list(searches.values())
