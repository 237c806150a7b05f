"""The events of a search for hyperparameters. Each trial's own training has its own log, in the folder that `TrialStarted` names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cvmk.telemetry.event import Event


@dataclass(frozen=True)
class SearchStarted(Event):
    """A search begins or goes on, in this worker."""

    KIND = "search_start"
    study: str
    metric: str
    direction: str
    """"maximize" or "minimize"."""
    sampler: str
    pruner: str | None
    space: dict[str, Any]
    """By configuration key, what it may be, as the configuration says it."""
    budget: dict[str, Any] = field(default_factory=dict)
    """trials, iterations, minutes: those that are limited."""
    trials: int = 0
    """Trials that were finished before."""
    worker: str = ""

    def text(self) -> str:
        before = f", {self.trials} trials are done" if self.trials else ""
        return f"study {self.study}: {len(self.space)} {'key' if len(self.space) == 1 else 'keys'}, {self.sampler}, {self.metric} ({self.direction}){before}"


@dataclass(frozen=True)
class TrialStarted(Event):
    """A trial's training begins."""

    KIND = "trial_start"
    trial: int
    """Its number in the study, from 0."""
    parameters: dict[str, Any]
    """By configuration key."""
    folder: str | None = None
    """Of its run."""
    worker: str = ""

    def text(self) -> str:
        values = (f"{key} = {value:.4g}" if isinstance(value, float) else f"{key} = {value}" for key, value in self.parameters.items())
        return f"trial {self.trial}: {', '.join(values)}"


@dataclass(frozen=True)
class TrialScored(Event):
    """A validation of a trial's run."""

    KIND = "trial_score"
    trial: int
    step: int
    metric: str
    value: float
    best: bool = False
    """Whether none of the trial's before was better."""


@dataclass(frozen=True)
class TrialTick(Event):
    """Where a trial is; for whoever looks on."""

    KIND = "trial_tick"
    RECORDED = False
    trial: int
    step: int
    loss: float


@dataclass(frozen=True)
class TrialEnded(Event):
    """A trial has ended; one that crashed has failed, and the search goes on. `value` is the score that counts: None where there is none."""

    KIND = "trial_end"
    trial: int
    state: str
    """"complete", "pruned" or "failed"."""
    value: float | None = None
    step: int | None = None
    """Its last iteration."""
    seconds: float | None = None
    reason: str = ""
    best: bool = False
    """Whether none before was better."""

    def text(self) -> str:
        value = "" if self.value is None else f" {self.value:.4g}"
        at = "" if self.step is None else f" at iteration {self.step}"
        return f"trial {self.trial}: {self.state}{value}{at}{' (best so far)' if self.best else ''}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True)
class SearchEnded(Event):
    """This worker takes no more trials. `best` is a trial's number, of the whole study; None where none is complete."""

    KIND = "search_end"
    best: int | None
    value: float | None
    parameters: dict[str, Any] = field(default_factory=dict)
    trials: dict[str, int] = field(default_factory=dict)
    """How many, by state."""
    reason: str = ""

    def text(self) -> str:
        counts = ", ".join(f"{count} {state}" for state, count in self.trials.items())
        best = "no trial is complete" if self.best is None else f"best: trial {self.best}" + ("" if self.value is None else f" with {self.value:.4g}")
        return f"{counts + '; ' if counts else ''}{best}{f' ({self.reason})' if self.reason else ''}"
