"""A process that trains one trial after the other, as it is told. Whoever runs the search owns the study: a worker knows nothing of it, and what
kills a worker costs a trial, not the search."""

from __future__ import annotations

import fcntl
import gc
import os
import queue
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvmk.errors import ConfigError, CvmkError, DataError, is_out_of_memory
from cvmk.telemetry import Record, Reporter

if TYPE_CHECKING:
    from cvmk.training.signals import StopSignal

WORKERS_LOCK = ".workers"
"""Held, shared, by every worker of a folder."""
_TICK_SECONDS = 0.5


# -- what a worker is told -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prepare:
    """Read what the configuration `text` names, and make what all trials share: a tokenizer in this folder, and a teacher by this configuration."""

    text: str
    tokenizer: str | None
    teacher: str | None


@dataclass(frozen=True)
class Train:
    """Run this configuration, or go on with it."""

    text: str


@dataclass(frozen=True)
class Stop:
    """End the iteration, write a checkpoint, and say Stopped."""


# -- what it answers -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Said:
    text: str


@dataclass(frozen=True)
class Scored:
    step: int
    value: float


@dataclass(frozen=True)
class Ticked:
    step: int
    loss: float


@dataclass(frozen=True)
class Done:
    """The job is finished: the training report; of a preparation, the fingerprints of the corpora."""

    found: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """The job came to a bad end. `final`: the next one would too."""

    reason: str
    exit_code: int
    final: bool


@dataclass(frozen=True)
class Stopped:
    """The job was stopped at this iteration, and can go on."""


def main(descriptor: int, folder: str) -> None:
    """Serve the connection in this descriptor until it is closed."""
    with open(Path(folder) / WORKERS_LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        _Worker(Connection(descriptor)).serve()


class _Worker:
    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Prepare | Train, StopSignal]] = queue.SimpleQueue()

    def serve(self) -> None:
        from cvmk.hardware import keep_freed_memory

        keep_freed_memory()
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            job, stop = self._jobs.get()
            self.send(self._outcome(job, stop))
            gc.collect()  # before the next trial needs the memory

    def send(self, message: object) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:  # nobody listens
            os._exit(1)

    def _listen(self) -> None:
        from cvmk.training.signals import StopSignal

        stop = StopSignal()
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):  # the search has ended, or was killed: checkpoints hold what there is to be kept
                os._exit(0)
            if isinstance(message, Stop):
                stop.request()
            else:
                stop = StopSignal()
                self._jobs.put((message, stop))

    def _outcome(self, job: Prepare | Train, stop: StopSignal) -> Done | Failed | Stopped:
        try:
            return Done(_prepare(job, self, stop) if isinstance(job, Prepare) else _train(job.text, "the trial", self, stop))
        except KeyboardInterrupt:  # Interrupted, or a second signal
            return Stopped()
        except (ConfigError, DataError) as error:
            return Failed(str(error), error.exit_code, final=True)
        except CvmkError as error:
            return Failed(str(error), error.exit_code, final=False)
        except Exception as error:
            if is_out_of_memory(error):
                return Failed("not enough memory", DataError.exit_code, final=False)
            traceback.print_exc()  # to the worker's log
            lines = str(error).splitlines()
            return Failed(f"{type(error).__name__}: {lines[0] if lines else 'without a word'}", CvmkError.exit_code, final=False)


class _Told(Reporter):
    """What is said goes to whoever runs the search."""

    def __init__(self, worker: _Worker) -> None:
        self._worker = worker

    def say(self, text: str) -> None:
        self._worker.send(Said(text))


class _Silent(Reporter):
    """A trial's own log says the same."""

    def say(self, text: str) -> None:
        pass


class _Watcher:
    """A subscriber that passes on how a trial does."""

    def __init__(self, worker: _Worker) -> None:
        self._worker, self._ticked = worker, 0.0

    def receive(self, record: Record) -> None:
        from cvmk.telemetry.schema import Step, Tick, Validation

        event = record.event
        if isinstance(event, Validation):
            self._worker.send(Scored(event.step, event.value))
        elif isinstance(event, (Step, Tick)) and time.monotonic() - self._ticked >= _TICK_SECONDS:
            self._ticked = time.monotonic()
            self._worker.send(Ticked(event.step, event.loss))

    def close(self) -> None:
        pass


def _train(text: str, name: str, worker: _Worker, stop: StopSignal) -> dict[str, Any]:
    from cvmk.config.loading import parse_config
    from cvmk.config.schema import TrainConfig
    from cvmk.training.pipeline import train

    def subscribers(title: str, folder: Path) -> Iterable[_Watcher]:
        return [] if title == "teacher" else [_Watcher(worker)]

    return train(parse_config(TrainConfig, text, name), text, _Silent(), resume=True, subscribers=subscribers, stop=stop)


def _prepare(job: Prepare, worker: _Worker, stop: StopSignal) -> dict[str, Any]:
    """Fingerprints of the corpora, by what they are for."""
    from cvmk.config.loading import parse_config
    from cvmk.config.schema import TrainConfig
    from cvmk.training.contents import contents_of
    from cvmk.training.materials import load_corpora, prepare_tokenizer
    from cvmk.training.pipeline import train
    from cvmk.training.teacher import is_trained

    config, reporter = parse_config(TrainConfig, job.text, "the configuration"), _Told(worker)
    corpora = load_corpora(config.data)
    if job.tokenizer is not None:
        prepare_tokenizer(config.tokenizer, corpora.train, Path(job.tokenizer), config.run.seed, reporter)
    if job.teacher is not None:
        teacher = parse_config(TrainConfig, job.teacher, "the teacher's configuration")
        if not is_trained(Path(teacher.run.folder)):
            reporter.say("the teacher is trained, once for all trials")
            train(teacher, job.teacher, reporter, resume=True, stop=stop)
    return {name: content.sha256 for name, content in contents_of((corpora.train, corpora.valid)).items()}
