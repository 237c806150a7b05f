"""The service's events in a folder: what it did in each minute, and what it used. The numbers are those of `Metrics`: nothing of a client is among them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cvmk.errors import CvmkError
from cvmk.serving.metrics import Metrics
from cvmk.telemetry import Event, EventStream, Gauges, RunLog
from cvmk.telemetry.schema import Serving, ServingEnded, ServingStarted

_Series = dict[tuple[str, str], float]
"""By the name of a sample and its first label's value, or another one's where that is what counts; equal ones are added up."""
_BY = {"cvmk_requests_total": "status", "cvmk_rejections_total": "reason"}
_log = logging.getLogger(__name__)


class ServiceLog:
    """An asynchronous context manager: events.jsonl and log.txt in `folder`, with an event every so many seconds.

    Raises ConfigError where another process writes there, DataError where it cannot be written; what fails later ends the log, and not the service.
    """

    def __init__(self, folder: Path, every: float, metrics: Metrics) -> None:
        self._folder, self._every, self._metrics = folder, every, metrics
        self._gauges = Gauges()
        self._before: _Series = {}
        self._now: Callable[[], float] = asyncio.get_running_loop().time
        self._time = 0.0
        self._events: EventStream | None = None
        self._task: asyncio.Task[None] | None = None
        self._failed = False

    async def __aenter__(self) -> ServiceLog:
        self._events = EventStream(RunLog(self._folder))
        self._before, self._time = _series(self._metrics), self._now()
        self._task = asyncio.create_task(self._watch(), name="cvmk service log")
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._task is not None and self._events is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._write(self._period(), ServingEnded())
        with contextlib.suppress(CvmkError):  # which `_write` has told
            await asyncio.to_thread(self._events.close)

    async def started(self, models: Mapping[str, Any], addresses: Mapping[str, str]) -> None:
        await self._write(ServingStarted(dict(models), dict(addresses)))

    async def _watch(self) -> None:
        while await asyncio.sleep(self._every, True):
            if not await self._write(self._period(), self._gauges.read()):
                return

    async def _write(self, *events: Event) -> bool:
        """Whether that was possible. In a thread: a disk that is slow must not hold up the event loop."""
        assert self._events is not None
        if self._failed:
            return False
        try:
            for event in events:
                await asyncio.to_thread(self._events.emit, event)
        except CvmkError as error:
            self._failed = True
            _log.error("the service goes on without its log: %s", error)
        return not self._failed

    def _period(self) -> Serving:
        """What has happened since the last one."""
        now, series = self._now(), _series(self._metrics)
        seconds, self._time = now - self._time, now
        before, self._before = self._before, series
        return _serving(seconds, series, defaultdict(float, {key: value - before.get(key, 0.0) for key, value in series.items()}))


def _series(metrics: Metrics) -> _Series:
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for metric in metrics.registry.collect():
        for sample in metric.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                label = sample.labels.get(_BY.get(sample.name, "model"), "")
                found[sample.name, label] += sample.value
    return dict(found)


def _serving(seconds: float, series: _Series, change: Mapping[tuple[str, str], float]) -> Serving:
    def counts(name: str) -> dict[str, int]:
        return {label: int(value) for (of, label), value in change.items() if of == name and value}

    def mean(name: str, label: str = "") -> float | None:
        count = change[f"{name}_count", label]
        return round(change[f"{name}_sum", label] / count, 6) if count else None

    models = {
        model: {
            "translations": int(change["cvmk_translations_total", model]),
            "queue_seconds": mean("cvmk_queue_seconds", model),
            "decode_seconds": mean("cvmk_decode_seconds", model),
            "first_text_seconds": mean("cvmk_first_text_seconds", model),
            "waiting_tokens": int(series.get(("cvmk_waiting_tokens", model), 0)),
            "running_tokens": int(series.get(("cvmk_running_tokens", model), 0)),
            "committed_characters": int(change["cvmk_committed_characters_total", model]),
            "deleted_characters": int(change["cvmk_deleted_characters_total", model]),
        }
        for name, model in series
        if name == "cvmk_translations_total"
    }
    return Serving(
        round(seconds, 3), int(series.get(("cvmk_sessions_active", ""), 0)), counts("cvmk_requests_total"), counts("cvmk_rejections_total"), models,
        mean("cvmk_event_loop_lag_seconds"),
    )  # fmt: skip
