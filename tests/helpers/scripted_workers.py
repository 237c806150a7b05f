"""Workers of a search that train nothing: a script says what becomes of each trial."""

from __future__ import annotations

import json
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from cvmk.search.result import SearchResult
from cvmk.search.worker import Done, Failed, Prepare, Scored, Stop, Stopped, Ticked

Script = Callable[[dict[str, Any]], Iterator[Any]]
"""From a trial's configuration, as TOML gives it, to what its worker says; None waits for the order to stop."""

Run = Callable[..., SearchResult]
"""A search by scripted workers: `run(*overrides, script=, workers=, text=)`."""

LOST = object()
"""The worker's process dies."""


class ScriptedWorker:
    """Stands in for `cvmk.search.workers.Worker`; a stop is heeded after every message, as training heeds it after every iteration."""

    script: Script
    prepared: list[Prepare] = []
    preparation: Any = Done({"data.train.source": "as it is"})

    def __init__(self, folder: Path) -> None:
        self.connection, self._child = Pipe()
        self.busy: int | None = None
        self._stop = threading.Event()
        self._heard = threading.Event()

    def give(self, job: Any) -> None:
        if isinstance(job, Stop):
            self._stop.set()
        elif isinstance(job, Prepare):
            self.prepared.append(job)
            self._child.send(self.preparation)
        else:
            self._stop.clear()
            threading.Thread(target=self._play, args=(type(self).script(tomllib.loads(job.text)),), daemon=True).start()

    def _play(self, messages: Iterator[Any]) -> None:
        try:
            for message in messages:
                if message is LOST:
                    self._child.close()
                    return
                if message is not None:
                    self._child.send(message)
                if self._stop.wait(30 if message is None else 0.03 if isinstance(message, Scored) else 0):
                    self._child.send(Stopped())
                    return
        except OSError:  # the search has ended
            pass

    def end(self) -> None:
        self._stop.set()
        self.connection.close()

    kill = end

    def death(self) -> Failed:
        return Failed("its process was ended by SIGKILL, as where the machine runs out of memory", 5, final=False)


def trial(scores: Sequence[float], every: int = 10) -> Iterator[Any]:
    """A trial with these scores, one after `every` iterations, that comes to its end with the last."""
    for place, score in enumerate(scores, 1):
        yield Ticked(place * every - 1, 1.0)
        yield Scored(place * every, score)
    yield Done({"iterations": len(scores) * every, "validation": {"value": scores[-1]}})


def by_rate(values: dict[str, Any]) -> Iterator[Any]:
    """A smaller learning rate is better, from the first score on."""
    worth = 1 / values["optimizer"]["learning_rate"]
    return trial([worth * share for share in (0.25, 0.5, 0.75, 1.0)])


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event for event in found if event["event"] in kinds]
