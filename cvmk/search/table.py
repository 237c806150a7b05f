"""The terminal's view of a search: a table that lives where there is a terminal, a line an event elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cvmk.telemetry import Record, Subscriber, Terminal, reporter
from cvmk.telemetry.console import duration
from cvmk.telemetry.schema import Note, SearchEnded, SearchStarted, TrialEnded, TrialScored, TrialStarted, TrialTick

if TYPE_CHECKING:
    from rich.console import Console

_ROWS = 12
_STYLES = {"complete": "green", "pruned": "yellow", "failed": "red", "running": "bold"}


def view() -> Subscriber:
    """Whoever shows a search on stderr."""
    if not sys.stderr.isatty():
        return Terminal(reporter(), "search")
    from rich.console import Console

    return _Table(Console(stderr=True, highlight=False))


@dataclass
class _Trial:
    number: int
    parameters: dict[str, Any]
    since: float
    state: str = "running"
    step: int = 0
    value: float | None = None
    seconds: float | None = None
    reason: str = ""


@dataclass
class _State:
    """What the table shows, from the events."""

    title: str = ""
    metric: str = ""
    limits: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    trials: dict[int, _Trial] = field(default_factory=dict)
    best: int | None = None
    before: int = 0
    """Trials that were done before this start."""

    def take(self, record: Record) -> None:
        event = record.event
        if isinstance(event, SearchStarted):
            self.title, self.metric, self.limits, self.before = event.study, event.metric, event.budget, event.trials
        elif isinstance(event, TrialStarted):
            self.trials[event.trial] = _Trial(event.trial, event.parameters, record.time)
        elif isinstance(event, (TrialTick, TrialScored)) and event.trial in self.trials:
            trial = self.trials[event.trial]
            trial.step = max(trial.step, event.step)
            if isinstance(event, TrialScored) and event.best:
                trial.value = event.value
        elif isinstance(event, TrialEnded) and event.trial in self.trials:
            trial = self.trials[event.trial]
            trial.state, trial.reason, trial.seconds = event.state, event.reason, event.seconds
            trial.value, trial.step = event.value, event.step or trial.step
            self.counts[event.state] = self.counts.get(event.state, 0) + 1
            self.best = event.trial if event.best else self.best

    def shown(self) -> list[_Trial]:
        """The running trials, the latest, and the best."""
        last = sorted(self.trials.values(), key=lambda trial: (trial.number == self.best, trial.state == "running", trial.number))[-_ROWS:]
        return sorted(last, key=lambda trial: trial.number)


class _Table:
    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._state = _State()
        self.console = console
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self.rendered)
        self._live.start()

    def receive(self, record: Record) -> None:
        event = record.event
        self._state.take(record)
        if isinstance(event, (Note, SearchStarted, SearchEnded)) and (text := event.text()):
            self.console.print(f"search: {text}", markup=False)

    def close(self) -> None:
        self._live.stop()

    def rendered(self) -> Any:
        from rich.table import Table

        state = self._state
        trials = state.shown()
        keys = list(trials[0].parameters) if trials else []
        before = [f"{state.before} before"] if state.before else []
        counts = ", ".join([*before, *(f"{count} {name}" for name, count in state.counts.items())])
        limits = ", ".join(f"{value:g} {name}" for name, value in state.limits.items())
        table = Table(title=state.title or None, caption=f"{counts or 'no trial has ended'}; budget {limits}" if limits else None, title_justify="left",
                      caption_justify="left", box=None, pad_edge=False)  # fmt: skip
        for name in ("trial", "state", "iteration", state.metric or "score", "time"):
            table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
        for key in keys:
            table.add_column(key.split(".")[-1], justify="right")
        table.add_column("")
        for trial in trials:
            seconds = trial.seconds if trial.seconds is not None else time.time() - trial.since
            value = "" if trial.value is None else f"{trial.value:.2f}" + ("*" if trial.number == state.best else " ")
            cells = [str(trial.number), trial.state, str(trial.step), value, duration(seconds)]
            table.add_row(*cells, *(shown(trial.parameters.get(key)) for key in keys), trial.reason, style=_STYLES.get(trial.state, ""))
        return table


def shown(value: Any) -> str:
    """A parameter for a person."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
