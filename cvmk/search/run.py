"""`cvmk search`: trials are proposed, trained by workers, pruned, and counted, until a budget is used up. `Search.run` is the whole story."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cvmk.errors import ConfigError, CvmkError, DataError, DivergedError
from cvmk.files import explained, lock
from cvmk.report.names import TRIALS
from cvmk.search.budget import Budget
from cvmk.search.result import SearchResult, write_result
from cvmk.search.setup import SearchSetup
from cvmk.search.shared import Shared
from cvmk.search.study import COMPLETE, FAILED, PRUNED, SEEN_SECONDS, SearchStudy, TrialRecord
from cvmk.search.worker import WORKERS_LOCK, Done, Failed, Said, Scored, Stop, Stopped, Ticked, Train
from cvmk.search.workers import PREPARING, Worker, Workers
from cvmk.telemetry import EventStream
from cvmk.telemetry.schema import SearchEnded, SearchStarted, TrialEnded, TrialScored, TrialStarted, TrialTick
from cvmk.training.signals import StopSignal
from cvmk.validation.metrics import LOWER_IS_BETTER

_WAIT_SECONDS = 0.5
_STOP_SECONDS = 120.0
_GONE_SECONDS = 10.0
_FAILURES = 10
"""So many trials that all failed end a search: something is wrong with all of them."""


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the trials that ran have written checkpoints, and go on with the next start."""


class _Running:
    """A trial that a worker trains."""

    def __init__(self, record: TrialRecord, worker: Worker) -> None:
        self.record, self.worker = record, worker
        self.step, self.clock = record.iterations, time.monotonic()
        self.best: float | None = None
        self.ending = ""
        """Why it was told to stop early, in words."""


class Search:
    """One search in one folder, by this process and its workers.

    Raises ConfigError and DataError, DivergedError (or as the last trial failed) where no trial was completed, and SearchInterrupted after Ctrl-C.
    """

    def __init__(self, setup: SearchSetup, events: Callable[[Path], EventStream], *, workers: int = 1) -> None:
        """`events` opens the stream of events in the search's folder."""
        self._config, self._search, self._space, self._text = setup.config, setup.search, setup.space, setup.text
        self._folder = Path(setup.search.folder)
        self._open_events, self._count = events, workers
        self._running: dict[int, _Running] = {}
        self._asked, self._told = StopSignal(), False
        self._seen = 0.0
        self._failures = 0
        self._last_failure: Failed | None = None
        self._best: float | None = None
        self._waiting: list[TrialRecord] = []

    def run(self) -> SearchResult:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_claimed(self._folder))
            self._study = self._opened()
            self._shared = Shared(self._config, self._space, self._folder, self._count)
            self._budget = Budget(self._search, self._folder)
            self._events = self._open_events(self._folder)
            stack.callback(self._events.close)
            self._workers = Workers(self._folder, self._count)
            stack.push(self._end_workers)
            stack.enter_context(self._asked.listening(self._events.notice, "stopping, the trials that run write a checkpoint"))
            self._start()
            self._prepare()
            reason = self._trials()
            self._budget.tick(last=True)
            return self._end(reason)

    def _opened(self) -> SearchStudy:
        base = json.loads(self._config.model_dump_json())
        for key in self._space.keys:
            _remove(base, key.split("."))
        return SearchStudy(
            self._search, self._space, base, self._folder,
            lower_is_better=self._config.validation.metric in LOWER_IS_BETTER,
            iterations=self._space.largest("training.iterations", self._config.training.iterations),
            every=self._config.validation.validate_every,
        )  # fmt: skip

    def _start(self) -> None:
        search, records = self._search, self._study.records()
        self._events.emit(
            SearchStarted(
                self._study.name, self._config.validation.metric, "minimize" if self._study.lower_is_better else "maximize", search.sampler,
                None if search.pruner == "none" else search.pruner, self._space.shown(), self._budget.limits(),
                sum(one.state != "running" for one in records),
            )  # fmt: skip
        )
        best = self._study.best()
        self._best = None if best is None else best.value

    # -- the loop ------------------------------------------------------------------------------------------------------------
    def _prepare(self) -> None:
        worker = self._workers.free()
        assert worker is not None
        worker.busy = PREPARING
        worker.give(self._shared.preparation())
        while worker.busy is not None:
            for _, message in self._messages():
                if isinstance(message, (Done, Failed, Stopped)):
                    worker.busy = None
                if isinstance(message, Said):
                    self._events.notice(message.text)
                elif isinstance(message, Done):
                    self._study.check_corpora(message.found)
                elif isinstance(message, Stopped):
                    raise SearchInterrupted
                elif isinstance(message, Failed):
                    raise _error(message)

    def _trials(self) -> str:
        """Start trials and hear of them until there are no more; why there are no more."""
        while True:
            reason = self._fill()
            if not self._running:
                if self._asked.received:
                    raise SearchInterrupted
                return reason or "the budget of trials is used up"
            for worker, message in self._messages():
                if worker.busy in self._running:
                    self._hear(self._running[worker.busy], message)
            if not self._asked.received and (reason := self._budget.used_up(self._progress)):
                for running in self._running.values():
                    self._stop(running, reason)

    def _messages(self) -> Iterator[tuple[Worker, Any]]:
        self._budget.tick()
        if self._asked.received and not self._told:
            self._told = True
            self._workers.stop()
        if self._running and time.monotonic() - self._seen >= SEEN_SECONDS:
            self._seen = time.monotonic()
            self._study.alive()
        yield from self._workers.messages(_WAIT_SECONDS)

    def _fill(self) -> str | None:
        """Give each worker that waits a trial; why there is none, where there is none."""
        while not self._asked.received and (worker := self._workers.free()) is not None:
            if reason := self._budget.used_up(self._progress):
                self._cut_waiting(reason)
                return reason
            if self._failures >= _FAILURES and self._best is None:
                return f"the last {self._failures} trials failed"
            self._waiting = self._waiting or self._study.adopt()
            record = self._waiting.pop(0) if self._waiting else self._study.ask(self._search.trials)
            if record is None:
                return "the budget of trials is used up"
            self._train(record, worker)
        return None

    def _train(self, record: TrialRecord, worker: Worker) -> None:
        folder = self._of_trial(record.number)
        running = self._running[record.number] = _Running(record, worker)
        if record.scores:
            running.best = (min if self._study.lower_is_better else max)(record.scores.values())
        self._events.emit(TrialStarted(record.number, record.parameters, str(folder)))
        worker.busy = record.number
        worker.give(Train(self._shared.trial(record.parameters, folder)))

    def _progress(self) -> list[TrialRecord]:
        """All trials of the study; of ours, with the iterations that we know of."""
        ours = {number: running.step for number, running in self._running.items()}
        return [record if record.number not in ours else _at(record, ours[record.number]) for record in self._study.records()]

    # -- one trial -----------------------------------------------------------------------------------------------------------
    def _hear(self, running: _Running, message: object) -> None:
        number = running.record.number
        if isinstance(message, Ticked):
            running.step = max(running.step, message.step)
            self._events.emit(TrialTick(number, message.step, message.loss))
        elif isinstance(message, Scored):
            self._score(running, message)
        elif isinstance(message, Done):
            self._complete(running, message.found)
        elif isinstance(message, Failed):
            if message.final:
                self._let_go(running)
                raise _error(message)
            self._finish(running, FAILED, reason=message.reason)
            self._last_failure = message
        elif isinstance(message, Stopped):
            if running.ending:
                self._finish(running, PRUNED, reason=running.ending)
            elif self._asked.received:
                self._let_go(running)
            else:
                self._finish(running, FAILED, reason="its process was told to end (SIGTERM)")

    def _score(self, running: _Running, message: Scored) -> None:
        number, better = running.record.number, self._better(message.value, running.best)
        running.step = max(running.step, message.step)
        running.best = message.value if better else running.best
        self._events.emit(TrialScored(number, message.step, self._config.validation.metric, message.value, better))
        if not math.isfinite(message.value):
            return
        last = running.record.parameters.get("training.iterations", self._config.training.iterations)
        if self._study.report(number, message.step, message.value) and message.step < last:  # after the last iteration there is nothing to save
            self._stop(running, f"{self._search.pruner} pruning at iteration {message.step}")

    def _stop(self, running: _Running, reason: str) -> None:
        if not running.ending:
            running.ending = reason
            running.worker.give(Stop())

    def _complete(self, running: _Running, report: dict[str, Any]) -> None:
        running.step = report["iterations"]
        value = report["validation"]["value"]
        if value is None or not math.isfinite(value):
            self._finish(running, FAILED, reason=f"its {self._config.validation.metric} is no number")
        else:
            self._finish(running, COMPLETE, value=value)

    def _finish(self, running: _Running, state: str, *, value: float | None = None, reason: str = "") -> None:
        number, seconds = running.record.number, time.monotonic() - running.clock
        self._study.finish(number, state, value=value, reason=reason, iterations=running.step, seconds=running.record.seconds + seconds)
        self._let_go(running)
        best = value is not None and self._better(value, self._best)
        self._best = value if best else self._best
        self._failures = self._failures + 1 if state == FAILED else 0
        shown = running.best if value is None else value
        self._events.emit(TrialEnded(number, state, shown, running.step, round(running.record.seconds + seconds, 2), reason, best))
        self._tidy()

    def _let_go(self, running: _Running) -> None:
        del self._running[running.record.number]
        running.worker.busy = None

    def _better(self, value: float, than: float | None) -> bool:
        return than is None or (value < than if self._study.lower_is_better else value > than)

    def _cut_waiting(self, reason: str) -> None:
        """Trials that were left unfinished, and for which no budget is left."""
        for record in self._waiting or self._study.adopt():
            self._study.finish(record.number, PRUNED, reason=reason, iterations=record.iterations, seconds=record.seconds)
            self._events.emit(TrialEnded(record.number, PRUNED, record.value, record.iterations, round(record.seconds, 2), reason))
        self._waiting = []

    # -- files ---------------------------------------------------------------------------------------------------------------
    def _of_trial(self, number: int) -> Path:
        return self._folder / TRIALS / f"{number:04d}"

    def _tidy(self) -> None:
        """Take away the weights of trials that are not the best."""
        if self._search.keep == "all":
            return
        best = self._study.best()
        for record in self._study.records():
            folder = self._of_trial(record.number)
            if record.state != "running" and (best is None or record.number != best.number):
                for name in ("checkpoints", "model"):
                    shutil.rmtree(folder / name, ignore_errors=True)

    def _end(self, reason: str) -> SearchResult:
        self._tidy()
        records, best = self._study.records(), self._study.best()
        counts: dict[str, int] = {}
        for record in records:
            counts[record.state] = counts.get(record.state, 0) + 1
        self._events.emit(SearchEnded(best.number if best else None, best.value if best else None, best.parameters if best else {}, counts, reason))
        if best is None:
            raise self._nothing(records)
        values = {record.value for record in records if record.state == COMPLETE}
        if len(values) == 1 and counts[COMPLETE] > 1:
            self._events.note(
                f"all {counts[COMPLETE]} complete trials have the same {self._config.validation.metric}, {best.value:g}, so the search chose nothing: "
                "give trials more iterations, or another validation.metric"
            )
        result = SearchResult(
            self._study.name, self._config.validation.metric, self._study.lower_is_better, reason, tuple(records), best, self._study.importances(),
            self._search.space, self._folder, round(self._budget.seconds, 2),
        )  # fmt: skip
        note = write_result(result, self._text, self._shared.overrides(best.parameters))
        if note:
            self._events.note(note)
        return result

    def _nothing(self, records: list[TrialRecord]) -> CvmkError:
        failed = [record for record in records if record.state == FAILED]
        why = f"; the last failure: {failed[-1].reason}" if failed else ""
        kind = DataError if self._last_failure is not None and self._last_failure.exit_code == DataError.exit_code else DivergedError
        return kind(
            f"none of the {len(records)} trials was completed, {len(failed)} failed{why}: see {self._folder / 'log.txt'}, give more budget or another space"
        )

    # -- signals and ends ----------------------------------------------------------------------------------------------------
    def _end_workers(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Let workers that are busy write their checkpoints, where the search ends early."""
        at_once = isinstance(error, KeyboardInterrupt) and not isinstance(error, SearchInterrupted)
        self._workers.stop()
        until = time.monotonic() + _STOP_SECONDS
        while not at_once and self._workers.busy and time.monotonic() < until:
            for worker, message in self._workers.messages(_WAIT_SECONDS):
                if isinstance(message, (Done, Failed, Stopped)):
                    worker.busy = None
        self._workers.end(kill=at_once)
        self._budget.tick(last=True)


def _error(message: Failed) -> CvmkError:
    kind = {ConfigError.exit_code: ConfigError, DivergedError.exit_code: DivergedError}.get(message.exit_code, DataError)
    return kind(message.reason if message.final else f"what all trials share could not be made: {message.reason}")


def _remove(values: dict[str, Any], path: list[str]) -> None:
    for part in path[:-1]:
        values = values.get(part) or {}
    values.pop(path[-1], None)


def _at(record: TrialRecord, step: int) -> TrialRecord:
    return dataclasses.replace(record, iterations=max(step, record.iterations))


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold the folder for this process, once the workers of one that was killed are gone."""
    with explained(folder, "use the search's folder"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            mine = lock(folder / ".lock")
        except BlockingIOError:
            raise ConfigError(
                f"another process is searching in {folder}: give it more --workers, or start this one with another search.folder and the same search.storage"
            ) from None
    with mine:
        until = time.monotonic() + _GONE_SECONDS
        while True:
            with contextlib.suppress(BlockingIOError), lock(folder / WORKERS_LOCK):
                break
            if time.monotonic() > until:
                raise DataError(f"workers of a search that has ended still run in {folder}: end them")
            time.sleep(0.05)
        yield
