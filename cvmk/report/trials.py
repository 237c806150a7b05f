"""A search in a report: all of its trials, what it searched, and what mattered."""

from __future__ import annotations

from typing import Any

from cvmk.report.comparison import label
from cvmk.report.document import Block, Bullets, Cell, Chart, Charts, Line, Section, Table, Text
from cvmk.report.history import Bin
from cvmk.report.run import pick
from cvmk.report.search import COMPLETE, Search
from cvmk.report.settings import written

_LISTED = 100
"""Trials in the table."""
_FAILURES = 10
_NOTHING = "–"


def section(search: Search) -> Section:
    found = Section(f"Search: {search.name}", [Text(_result(search))])
    if search.trials:
        found.blocks += [_keys(search), *_history(search), *_trials(search), *_failures(search)]
    return found


def _result(search: Search) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in search.counts().items())
    best = search.best
    score = "no trial is complete" if best is None else f"the best is {best.name} with {label(search.metric)} {best.value:.2f} on the validation set"
    ended = f"it ended because {search.ended}" if search.ended else "it goes on, or was interrupted"
    return f"{len(search.trials)} trials{f' ({counts})' if counts else ''}; {score}; {ended}."


def _keys(search: Search) -> Table:
    """What was searched, what the best has, and how much it mattered; the most important first."""
    best = search.best
    keys = sorted(search.space, key=lambda key: -search.importances.get(key, 0.0))
    rows: list[list[str | Cell]] = []
    for key in keys:
        share = search.importances.get(key)
        row = [key, range_of(search.space[key]), _NOTHING if best is None else value_of(best.parameters.get(key))]
        rows.append([*row, _NOTHING if share is None else f"{share:.2f}"])
    return Table(["key", "searched", "of the best", "importance"], rows, texts=2)


def _history(search: Search) -> list[Block]:
    """Every trial's score by its number, and the best until then."""
    steps: list[Bin] = []
    for number, trial in sorted(search.trials.items()):
        if steps:
            steps.append(_bin(number, steps[-1].mean))
        if trial.state == COMPLETE and trial.value is not None and (not steps or search.is_better(trial.value, steps[-1].mean)):
            steps.append(_bin(number, trial.value))
    lines = [Line("best so far", steps, 0)] if len(steps) > 1 else []
    for color, state in enumerate(search.counts(), 1):
        of_state = [_bin(number, trial.value) for number, trial in sorted(search.trials.items()) if trial.state == state and trial.value is not None]
        if of_state:
            lines.append(Line(state, of_state, color, joined=False))
    title = f"{label(search.metric)} of each trial"
    told = "" if all(trial.state == COMPLETE for trial in search.trials.values()) else "of those that ended early the best until then"
    return [Charts([Chart(title, told, lines, axis="trial")])] if lines else []


def _bin(number: int, value: float) -> Bin:
    return Bin(number, number, value, value, value)


def _trials(search: Search) -> list[Block]:
    keys = list(dict.fromkeys([*search.space, *(key for trial in search.trials.values() for key in trial.parameters)]))
    short = [key.rpartition(".")[2] for key in keys]
    names = [last if short.count(last) == 1 else key for key, last in zip(keys, short, strict=True)]
    rows: list[list[str | Cell]] = []
    for trial in search.ranked()[:_LISTED]:
        figures = [_NOTHING if trial.value is None else f"{trial.value:.2f}", value_of(trial.iterations), value_of(trial.seconds, 1)]
        tone = {"complete": "good", "failed": "bad"}.get(trial.state, "")
        rows.append([trial.name, Cell(trial.state, tone), *figures, *(value_of(trial.parameters.get(key)) for key in keys)])
    table = Table(["trial", "state", label(search.metric), "iterations", "seconds", *names], rows, texts=2)
    left = len(search.trials) - len(rows)
    heading = Text("Trials, the best first", heading=True)
    return [heading, table, *([Text(f"And {left} more, which are not listed.")] if left > 0 else [])]


def _failures(search: Search) -> list[Block]:
    failed = [(trial.name, trial.reason) for _, trial in sorted(search.trials.items()) if trial.state == "failed"]
    if not failed:
        return []
    more = [("", f"and {len(failed) - _FAILURES} more")] if len(failed) > _FAILURES else []
    return [Text("Why trials failed", heading=True), Bullets([*failed[:_FAILURES], *more])]


def value_of(value: Any, decimals: int | None = None) -> str:
    """A parameter, or a figure with so many decimals."""
    if isinstance(value, float):
        return f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"
    return _NOTHING if value is None else written(value)


def range_of(searched: Any) -> str:
    """What a key may be, in words."""
    choices = pick(searched, "choices")
    if isinstance(choices, list):
        return ", ".join(map(value_of, choices))
    step, low, high = pick(searched, "step"), pick(searched, "low"), pick(searched, "high")
    how = ", logarithmic" if pick(searched, "log") else f" in steps of {value_of(step)}" if step is not None else ""
    return f"{value_of(low)} to {value_of(high)}{how}"
