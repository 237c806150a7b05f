"""Events as curves: what is drawn, whoever draws it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cvmk.telemetry.schema import Epoch, Event, Iterations, Record, Resources, Resumed, Rollback, Scored, Serving, Start, Step, Validation

PARTS = ("cross_entropy", "logits", "hidden", "attention")


class Point(NamedTuple):
    name: str
    step: int
    value: float


def points(event: Event, period: int = 0) -> Iterator[Point]:
    """The numbers of an event that belong on a curve over the iterations; those that are not finite too.

    A service has no iterations: its events stand at `period`, the number of its `Serving` events so far.

    loss, learning_rate, gradient_norm, tokens_per_second, seconds (of an iteration), data_wait (seconds of these); loss/PART of what is logged;
    validation/METRIC and agreement/METRIC; epoch/loss and epoch/anomalies; process/cpu (cores), machine/cpu (share), process/memory and machine/memory
    (bytes), gpuN/use (share) and gpuN/memory (bytes).

    Of a service: service/requests, service/failures and service/rejections (a second), service/sessions (open), service/loop_lag (seconds); of each of its
    models service/translations/MODEL and service/characters/MODEL (a second), the means service/queue_seconds/MODEL, service/decode_seconds/MODEL and
    service/first_text_seconds/MODEL, and service/waiting_tokens/MODEL and service/running_tokens/MODEL.
    """
    if isinstance(event, Iterations):
        yield from _iterations(event)
    elif isinstance(event, Step):
        for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
            yield Point(name, event.step, getattr(event, name))
        yield from (Point(f"loss/{part}", event.step, getattr(event, part)) for part in PARTS if getattr(event, part))
    elif isinstance(event, Validation):
        yield from _scores(event)
    elif isinstance(event, Epoch):
        yield Point("epoch/loss", event.step, event.loss)
        yield Point("epoch/anomalies", event.step, sum(event.anomalies.values()))
    elif isinstance(event, Resources) and (event.step is not None or period):
        yield from _resources(event, period if event.step is None else event.step)
    elif isinstance(event, Serving):
        yield from (Point(f"service/{name}", period, value) for name, value in _service(event))


def _iterations(event: Iterations) -> Iterator[Point]:
    rows = zip(event.loss, event.learning_rate, event.gradient_norm, event.tokens, event.seconds, event.data_wait, strict=False)
    for step, (loss, rate, norm, tokens, seconds, wait) in enumerate(rows, event.step):
        yield Point("loss", step, loss)
        yield Point("learning_rate", step, rate)
        yield Point("gradient_norm", step, norm)
        yield Point("tokens_per_second", step, tokens / seconds if seconds > 0 else math.nan)
        yield Point("seconds", step, seconds)
        yield Point("data_wait", step, wait)


def _scores(event: Scored) -> Iterator[Point]:
    for kind, scores in (("validation", event.scores), ("agreement", event.agreement)):
        for score in scores:
            if isinstance(score, dict) and isinstance(value := score.get("value"), (int, float)):
                yield Point(f"{kind}/{score.get('metric')}", event.step, value)


def _resources(event: Resources, step: int) -> Iterator[Point]:
    found: dict[str, Any] = {
        "process/cpu": event.process_cpu, "machine/cpu": event.machine_cpu, "process/memory": event.memory, "machine/memory": event.machine_memory,
    }  # fmt: skip
    for gpu in event.gpus:
        found |= {f"gpu{gpu.get('index')}/{name}": gpu.get(name) for name in ("use", "memory")}
    yield from (Point(name, step, value) for name, value in found.items() if isinstance(value, (int, float)))


def _service(event: Serving) -> Iterator[tuple[str, float]]:
    failures = {status: count for status, count in event.requests.items() if status not in _NO_FAILURES}
    for name, counts in (("requests", event.requests), ("failures", failures), ("rejections", event.rejections)):
        yield name, _rate(sum(filter(_is_number, counts.values())), event.seconds)
    yield "sessions", event.sessions
    if event.loop_lag is not None:
        yield "loop_lag", event.loop_lag
    for model, told in event.models.items():
        found = {name: value for name, value in told.items() if _is_number(value)} if isinstance(told, dict) else {}
        for name, of in (("translations", "translations"), ("characters", "committed_characters")):
            if of in found:
                yield f"{name}/{model}", _rate(found[of], event.seconds)
        yield from ((f"{name}/{model}", found[name]) for name in _OF_A_MODEL if name in found)


_NO_FAILURES = ("OK", "CANCELLED")
_OF_A_MODEL = ("queue_seconds", "decode_seconds", "first_text_seconds", "waiting_tokens", "running_tokens")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else math.nan


@dataclass
class Curve:
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Seconds since the epoch."""

    def cut(self, step: int) -> None:
        """Forget what is after `step`."""
        while self.steps and self.steps[-1] > step:
            for column in (self.steps, self.values, self.times):
                column.pop()


class Curves:
    """The curves of one run, by the names of `points`. Steps rise: what a rollback or a resumption undid is forgotten."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.series: dict[str, Curve] = {}
        self._periods = 0
        for record in records:
            self.add(record)

    def add(self, record: Record) -> list[Point]:
        """Take an event in; the points that it added."""
        event = record.event
        if isinstance(event, Rollback):
            self._cut(event.to)
        elif isinstance(event, (Resumed, Start)):
            self._cut(event.step)
        added = []
        self._periods += isinstance(event, Serving)
        for point in points(event, self._periods):
            curve = self.series.setdefault(point.name, Curve())
            if curve.steps and point.step <= curve.steps[-1]:
                continue  # `Step` says again what `Iterations` said
            curve.steps.append(point.step)
            curve.values.append(point.value)
            curve.times.append(record.time)
            added.append(point)
        return added

    def _cut(self, step: int) -> None:
        for curve in self.series.values():
            curve.cut(step)


__all__ = ["Curve", "Curves", "Point", "points"]
