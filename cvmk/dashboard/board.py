"""All runs of a dashboard: found, followed by a thread, and asked for what a page shows."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvmk.dashboard import find
from cvmk.dashboard.charts import GROUPS, Chart, order
from cvmk.dashboard.numbers import Window
from cvmk.dashboard.run import Run

_LOOK_SECONDS = 0.5
_FIND_SECONDS = 5.0


class Query(NamedTuple):
    """What a page asks for. `since` is the version that it has of the same."""

    axis: str = "step"
    low: float | None = None
    high: float | None = None
    points: int = 400
    chosen: frozenset[str] | None = None
    """Keys of the runs whose numbers are wanted; None for all that are chosen at first."""
    since: str = ""


class Board:
    """The runs in `paths`, which `find.check` has checked. A context manager, in which a thread follows them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = [os.path.abspath(path) for path in paths]
        self._runs: dict[str, Run] = {}
        self._left_out = 0
        self._instance = secrets.token_hex(4)
        self._revision = 0
        self._failure: BaseException | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="cvmk dashboard", daemon=True)
        self._find()

    def __enter__(self) -> Board:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._thread.join()

    @property
    def runs(self) -> list[Run]:
        return list(self._runs.values())

    def _find(self) -> None:
        folders = {os.path.realpath(folder): folder for path in self._paths for folder in find.found(path)}
        new = [folder for real, folder in folders.items() if real not in self._runs]
        room = max(0, find.RUNS - len(self._runs))
        self._left_out = len(new) - room if len(new) > room else 0
        if new and room:
            runs = self._runs | {os.path.realpath(folder): Run(folder, folder.name) for folder in new[:room]}
            for (real, run), name in zip(runs.items(), find.names([run.folder for run in runs.values()]), strict=True):
                run.name = name
                run.is_nested = any(str(parent) in runs for parent in Path(real).parents)
            self._runs = runs
            self._revision += 1

    def _follow(self) -> None:
        try:
            self._follow_on()
        except BaseException as error:  # who asks is told
            self._failure = error
            raise

    def _follow_on(self) -> None:
        looked = time.monotonic()
        while not self._ending.is_set():
            more = [run.advance() for run in self.runs]
            if any(more):
                self._revision += 1
                time.sleep(0.001)  # whoever asks gets a turn
            else:
                self._ending.wait(_LOOK_SECONDS)
            if time.monotonic() - looked > _FIND_SECONDS:
                self._find()
                looked = time.monotonic()

    def answer(self, query: Query) -> dict[str, Any]:
        """What a page shows, as JSON values; only its version where that is the one that the page has. Raises RuntimeError where the thread has failed."""
        if self._failure is not None:
            raise RuntimeError("the runs are no longer followed") from self._failure
        version = f"{self._instance}.{self._revision}"
        if query.since == version:
            return {"version": version, "now": time.time()}
        runs = {str(place): run for place, run in enumerate(self.runs)}
        told = {key: run.summary() for key, run in runs.items()}
        chosen = query.chosen if query.chosen is not None else frozenset(key for key, one in told.items() if not one["nested"])
        charts: dict[str, Chart] = {}
        shown, marks, samples = {}, {}, {}
        for key, run in runs.items():
            if key in chosen:
                windows, marks[key] = run.view(query.axis, query.low, query.high, query.points)
                shown[key] = {name: _columns(window) for name, window in windows.items() if len(window.x)}
                samples[key] = run.samples()
                charts |= run.charts.copy()
        return {
            "version": version,
            "now": time.time(),
            "axis": query.axis,
            "left_out": self._left_out,
            "runs": told,
            "groups": GROUPS,
            "charts": [
                {"key": chart.name, "table": chart.table, "group": chart.group, "title": chart.title, "unit": chart.unit, "is_part": chart.is_part}
                for chart in sorted(charts.values(), key=order)
            ],
            "shown": shown,
            "marks": marks,
            "samples": {key: found for key, found in samples.items() if found},
        }


def _columns(window: Window) -> dict[str, Any]:
    """A window as lists: x; where a line breaks, and where it is faint (places in x); of each field means, and what was least and greatest where it differs."""
    columns: dict[str, Any] = {
        "x": _short(window.x, 9),
        "breaks": (np.flatnonzero(np.diff(window.segment)) + 1).tolist(),
        "faint": np.flatnonzero(window.faint).tolist(),
        "fields": {},
    }
    for place, name in enumerate(window.fields):
        mean, least, greatest = window.mean[:, place], window.least[:, place], window.greatest[:, place]
        if np.isnan(mean).all():
            continue
        columns["fields"][name] = {"mean": _short(mean)}
        if (least < greatest).any():
            columns["fields"][name] |= {"least": _short(least), "greatest": _short(greatest)}
    return columns


def _short(values: Any, digits: int = 6) -> list[float | None]:
    """With so many significant digits; None where there is no number."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(values))))
        rounded = np.where(np.isfinite(scale), np.round(values * scale) / scale, values)
    return [value if value == value and abs(value) != float("inf") else None for value in rounded.tolist()]
