"""What the trials of a search share: tokenizer, teacher, and the folder where encoded text and the teacher's translations are kept."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvmk.config.overrides import dumps
from cvmk.config.schema import Recipe, TrainConfig
from cvmk.search.space import Space
from cvmk.search.worker import Prepare


class Shared:
    """Made once where no key of the space changes it, and by each trial for itself otherwise."""

    def __init__(self, config: TrainConfig, space: Space, folder: Path, workers: int) -> None:
        self._config, self._space, self._folder, self._workers = config, space, folder, workers
        varied = space.searched("data", "tokenizer", "run.seed")
        named = config.teacher is not None and config.teacher.path is not None
        self.tokenizer = None if varied or named or config.tokenizer.path is not None else folder / "tokenizer"
        settled = config.tokenizer.path is not None or self.tokenizer is not None
        taught = config.teacher is not None and not named and settled and not varied and not space.searched("teacher")
        self.teacher = folder / "teacher" if taught else None

    def preparation(self) -> Prepare:
        teacher = None
        if self.teacher is not None:
            values = self._values()
            recipe = {name: table for name, table in values.pop("teacher").items() if name in Recipe.model_fields}
            values = {name: table for name, table in values.items() if name not in Recipe.model_fields and name != "distillation"} | recipe
            self._place(values, self.teacher)
            if self.tokenizer is not None:
                values["tokenizer"] = {"path": str(self.tokenizer)}
            teacher = dumps(values)
        return Prepare(dumps(self._values()), str(self.tokenizer) if self.tokenizer else None, teacher)

    def trial(self, parameters: Mapping[str, Any], folder: Path) -> str:
        """The whole configuration of a trial, as TOML. The test set has no part in a search."""
        values = self._values(parameters)
        self._place(values, folder)
        values["run"].setdefault("report", False)  # `cvmk report` writes one of the trials that somebody wants to look at
        if self.tokenizer is not None:
            values["tokenizer"] = {"path": str(self.tokenizer)}
        if self.teacher is not None:
            values["teacher"] = {"path": str(self.teacher)}
        return dumps(values)

    def overrides(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """By dotted key, what a trial's configuration says otherwise than the search's, beside where it is."""
        places = {"tokenizer.path": self.tokenizer, "teacher.path": self.teacher}
        return dict(parameters) | {key: str(path) for key, path in places.items() if path is not None}

    def _values(self, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        values = self._space.with_values(parameters or {})
        values["data"].pop("test", None)
        return values

    def _place(self, values: dict[str, Any], folder: Path) -> None:
        run = values.setdefault("run", {})
        run["folder"] = str(folder)
        if not self._config.run.threads and self._workers > 1:
            run["threads"] = max(1, len(os.sched_getaffinity(0)) // self._workers)
        if not self._config.data.cache:
            values["data"] = copy.deepcopy(values["data"]) | {"cache": str(self._folder / "cache")}
