"""What a search may spend, and what it has spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cvmk.config.search import SearchConfig
from cvmk.files import read_json, write_json
from cvmk.search.study import TrialRecord

_CLOCK = "clock.json"
_KEEP_SECONDS = 5.0


class Budget:
    """Trials are counted by the study, iterations over all its trials, minutes by a clock in the folder that stands while no search runs there."""

    def __init__(self, config: SearchConfig, folder: Path) -> None:
        self._config, self._path = config, folder / _CLOCK
        found = read_json(self._path) if self._path.exists() else {}
        self._before = float(found.get("seconds", 0.0)) if isinstance(found, dict) else 0.0
        self._start = self._kept = time.monotonic()

    @property
    def seconds(self) -> float:
        """That this folder's search has run."""
        return self._before + time.monotonic() - self._start

    def tick(self, *, last: bool = False) -> None:
        """Note the time now and then, so that a search that is killed loses little."""
        if last or time.monotonic() - self._kept >= _KEEP_SECONDS:
            self._kept = time.monotonic()
            write_json(self._path, {"seconds": round(self.seconds, 2)})

    def used_up(self, trials: Callable[[], Iterable[TrialRecord]]) -> str | None:
        """Which budget is used up by what `trials` do now, in words; that of trials is not, for it only limits new ones."""
        config = self._config
        if config.minutes and self.seconds >= 60 * config.minutes:
            return f"the budget of {config.minutes:g} minutes is used up"
        if config.iterations and sum(trial.iterations for trial in trials()) >= config.iterations:
            return f"the budget of {config.iterations} iterations is used up"
        return None

    def limits(self) -> dict[str, Any]:
        config = self._config
        return {name: value for name in ("trials", "iterations", "minutes") if (value := getattr(config, name))}
