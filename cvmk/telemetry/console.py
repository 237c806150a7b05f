"""The terminal's view of a run: a progress bar where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any


class Reporter:
    """Plain lines on stderr."""

    def say(self, text: str) -> None:
        """One line that a person should see."""
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def progress(self, title: str, total: int, start: int = 0) -> Iterator[Progress]:
        """A progress display of `total` iterations, `start` of them done."""
        yield Progress(self, title, total, start)


class Progress:
    """Plain progress: a line whenever `log` is set, with the time left."""

    def __init__(self, reporter: Reporter, title: str, total: int, start: int) -> None:
        self._reporter, self._title, self._total = reporter, title, total
        self._clock, self._start = time.monotonic(), start

    def update(self, done: int, text: str = "", *, log: bool = False) -> None:
        """`done` iterations are done; `text` says how it goes; `log` asks for a line of its own."""
        if log:
            self._reporter.say(f"{self._title} {done}/{self._total}  {text}  {self._left(done)}".rstrip())

    def _left(self, done: int) -> str:
        spent = time.monotonic() - self._clock
        if done <= self._start or done >= self._total:
            return ""
        return f"eta {duration((self._total - done) * spent / (done - self._start))}"


class _RichReporter(Reporter):
    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    @contextlib.contextmanager
    def progress(self, title: str, total: int, start: int = 0) -> Iterator[Progress]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        with Bars(*columns, console=self._console, refresh_per_second=4, transient=False) as bars:
            task = bars.add_task(title, total=total, completed=start, text="")
            yield _RichProgress(bars, task)


class _RichProgress(Progress):
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def update(self, done: int, text: str = "", *, log: bool = False) -> None:
        fields = {"text": text} if text else {}
        self._bars.update(self._task, completed=done, **fields)


def reporter() -> Reporter:
    """Bars where stderr is a terminal and rich is installed, lines elsewhere."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            return _RichReporter()
    return Reporter()


def duration(seconds: float) -> str:
    """1:02:03 or 2:03 for a number of seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
