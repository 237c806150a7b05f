"""The worker processes of a search, seen from the process that runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from cvmk.search.worker import Failed, Prepare, Stop, Train

LOG = "workers.log"
_END_SECONDS = 10.0


class Worker:
    """A process for one job at a time. It is in a process group of its own: Ctrl-C reaches the search, which tells its workers."""

    def __init__(self, folder: Path) -> None:
        self.connection, child = Pipe()
        code = f"from cvmk.search.worker import main; main({child.fileno()}, {str(folder)!r})"
        with open(folder / LOG, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code], stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(child.fileno(),), process_group=0,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )  # fmt: skip
        child.close()
        self.busy: int | None = None
        """The trial that it trains; PREPARING, or None where it waits."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def give(self, job: Prepare | Train | Stop) -> None:
        try:
            self.connection.send(job)
        except OSError:  # it is dead, and `messages` says so
            pass

    def end(self) -> None:
        """Close the connection, at which it ends; it is killed where it does not."""
        self.connection.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def death(self) -> Failed:
        """How it ended, once its connection is closed."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.returncode
        if code >= 0:
            return Failed(f"its process ended with exit code {code}, see {LOG}", 1, final=False)
        why = ", as where the machine runs out of memory" if -code == signal.SIGKILL else ""
        return Failed(f"its process was ended by {signal.Signals(-code).name}{why}", 5 if why else 1, final=False)


PREPARING = -1


class Workers:
    """As many workers as are needed, at most `count`."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self._all: list[Worker] = []

    def free(self) -> Worker | None:
        """One that waits for a job, a new one if need be; None where all are busy."""
        waiting = next((worker for worker in self._all if worker.busy is None), None)
        if waiting is None and len(self._all) < self._count:
            waiting = Worker(self._folder)
            self._all.append(waiting)
        return waiting

    @property
    def busy(self) -> Sequence[Worker]:
        return [worker for worker in self._all if worker.busy is not None]

    def messages(self, seconds: float) -> Iterator[tuple[Worker, Any]]:
        """What the workers have said, after a wait of `seconds` at most; a worker that has died is taken out, and its last word is Failed."""
        ready = wait([worker.connection for worker in self._all], seconds)
        for worker in [worker for worker in self._all if worker.connection in ready]:
            try:
                yield worker, worker.connection.recv()
            except (EOFError, OSError):
                self._all.remove(worker)
                yield worker, worker.death()

    def stop(self) -> None:
        """Let those that are busy write a checkpoint."""
        for worker in self.busy:
            worker.give(Stop())

    def end(self, *, kill: bool = False) -> None:
        for worker in self._all:
            worker.kill() if kill else worker.end()
        self._all = []
