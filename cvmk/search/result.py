"""What a search leaves: the best configuration, all trials, and plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cvmk.config.overrides import toml_value, with_overrides, without_table
from cvmk.config.search import RangeConfig
from cvmk.files import write_json, write_text
from cvmk.report.names import SEARCH_REPORT
from cvmk.search.study import TrialRecord

BEST = "best.toml"


@dataclass(frozen=True)
class SearchResult:
    """A finished search. `trials` are all of the study, by number; `importances` are shares, largest first."""

    study: str
    metric: str
    lower_is_better: bool
    reason: str
    """Why it ended."""
    trials: tuple[TrialRecord, ...]
    best: TrialRecord
    importances: dict[str, float]
    ranges: Mapping[str, RangeConfig]
    """What was searched."""
    folder: Path
    seconds: float

    @property
    def configuration(self) -> Path:
        """The best configuration, which `cvmk train` runs as it is."""
        return self.folder / BEST

    def counts(self) -> dict[str, int]:
        """Trials by state."""
        found: dict[str, int] = {}
        for trial in self.trials:
            found[trial.state] = found.get(trial.state, 0) + 1
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "study": self.study,
            "metric": self.metric,
            "direction": "minimize" if self.lower_is_better else "maximize",
            "reason": self.reason,
            "space": {key: one.shown() for key, one in self.ranges.items()},
            "seconds": self.seconds,
            "counts": self.counts(),
            "best": asdict(self.best),
            "configuration": str(self.configuration),
            "importances": self.importances,
            "trials": [asdict(trial) for trial in self.trials],
        }


def write_result(result: SearchResult, text: str, overrides: Mapping[str, Any]) -> str | None:
    """Write best.toml, search_report.json and plots into the search's folder; a sentence where there are no plots.

    `text` is the searched configuration, `overrides` what the best says otherwise.
    """
    write_text(result.configuration, best_text(result, text, overrides))
    write_json(result.folder / SEARCH_REPORT, result.to_dict())
    from cvmk.search.plots import write_plots

    return write_plots(result)


def best_text(result: SearchResult, text: str, overrides: Mapping[str, Any]) -> str:
    """The whole configuration of the best trial, with the test set of the searched one, and a folder of its own."""
    if "teacher.path" in overrides:
        text = without_table(text, "teacher")  # it is trained
    if "tokenizer.path" in overrides:
        text = without_table(text, "tokenizer")
    values = dict(overrides) | {"run.folder": str(result.folder / "best")}
    text = with_overrides(text, [f"{key}={toml_value(value)}" for key, value in values.items()], "cvmk search")
    head = f"# Of {len(result.trials)} trials the best, number {result.best.number}: {result.metric} {result.best.value:.2f} on the validation set."
    return f"{head}\n{text}"
