"""Which requests an engine works on: they wait, begin when there is room, run a step at a time, and leave when they end or are cancelled."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from cvmk.inference.engine import Event, Finished, Partial, Request
from cvmk.inference.options import BROKEN, Hypothesis, SearchOptions


@dataclass(eq=False)
class Entry:
    """A request and whether it was cancelled. Ids come back when a request has ended; entries are each their own."""

    request: Request
    cancelled: bool = False
    deadline: float = math.inf  # of time.monotonic()

    @property
    def cost(self) -> int:
        """Source positions times hypotheses: what the budget counts."""
        return (len(self.request.source) + 1) * self.request.options.beam_size


class Decoding(Protocol):
    """Requests of the same options that are decoded together, in whatever way an engine does that."""

    def advance(self) -> Iterable[tuple[Entry, list[Hypothesis]]]:
        """One piece further: the entries that ended, with their hypotheses. They are no longer in it."""

    def partial(self, entry: Entry) -> list[int]:
        """The best hypothesis so far of an entry that is in it."""

    def so_far(self, entry: Entry) -> list[Hypothesis]:
        """What there is of an entry that is in it, the best first."""

    def drop(self, entries: Sequence[Entry]) -> None:
        """Let these go; some others stay."""

    def join(self, other: Self) -> None:
        """Take over the entries of another."""


Kind = TypeVar("Kind", bound=Decoding)


class _Group(Generic[Kind]):
    """A decoding, the entries that are in it, and whether any asks for partial translations."""

    def __init__(self, decoding: Kind, entries: Iterable[Entry]) -> None:
        self.decoding, self.entries, self.tells = decoding, dict[Entry, None](), False
        self.add(entries)

    def add(self, entries: Iterable[Entry]) -> None:
        self.entries.update(dict.fromkeys(entries))
        self.tells = any(entry.request.partial for entry in self.entries)


class Scheduler(Generic[Kind]):
    """`submit`, `step` and `cancel` of an engine (see `engine.Engine`) over decodings that `begin` makes of entries with the same options.

    budget bounds the sum of `Entry.cost` of what runs at once; a request beyond it runs alone. Requests begin in the order in which they came.
    """

    def __init__(self, begin: Callable[[Sequence[Entry]], Kind], budget: float) -> None:
        self._begin, self._budget = begin, budget
        self._stepping = threading.Lock()
        self._running: dict[SearchOptions, _Group[Kind]] = {}
        self._told: list[tuple[Entry, Event]] = []
        self._lock = threading.Lock()  # guards what follows, and whether an entry is cancelled
        self._entries: dict[Hashable, Entry] = {}
        self._waiting: dict[Entry, None] = {}
        self._leaving: list[Entry] = []

    def submit(self, request: Request) -> None:
        with self._lock:
            if request.id in self._entries:
                raise ValueError(f"the id {request.id!r} is in use by a request that has not ended: cancel that one, or choose another id")
            deadline = math.inf if request.timeout is None else time.monotonic() + request.timeout
            entry = self._entries[request.id] = Entry(request, deadline=deadline)
            self._waiting[entry] = None

    def cancel(self, id: Hashable) -> bool:
        with self._lock:
            entry = self._entries.pop(id, None)
            if entry is None:
                return False
            entry.cancelled = True
            if entry in self._waiting:
                del self._waiting[entry]
            else:
                self._leaving.append(entry)
            return True

    def step(self) -> list[Event]:
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("another thread is in step(): let one thread at a time step an engine")
        try:
            self._expire()
            self._let_go()
            self._admit()
            for options, group in list(self._running.items()):
                self._advance(options, group)
            return self._tell()
        finally:
            self._stepping.release()

    def _expire(self) -> None:
        """End what is too late, with what there is of it."""
        now = time.monotonic()
        with self._lock:
            late = [entry for entry in self._entries.values() if entry.deadline <= now]
        for entry in late:
            group = self._running.get(entry.request.options)
            running = group is not None and entry in group.entries
            found = group.decoding.so_far(entry) if group is not None and running else [BROKEN]
            with self._lock:
                if entry.cancelled or self._entries.get(entry.request.id) is not entry:
                    continue
                self._waiting.pop(entry, None)
                if running:
                    self._leaving.append(entry)
            self._told.append((entry, Finished(entry.request.id, found, "expired")))

    def _let_go(self) -> None:
        """Take out of the decodings what was cancelled."""
        with self._lock:
            leaving, self._leaving = self._leaving, []
        for options in {entry.request.options for entry in leaving}:
            group = self._running.get(options)
            gone = [entry for entry in leaving if group is not None and entry in group.entries]
            if group is None or not gone:
                continue
            if len(gone) == len(group.entries):
                del self._running[options]
            else:
                with self._failing(options, group.entries):
                    group.decoding.drop(gone)
                for entry in gone:
                    del group.entries[entry]

    def _admit(self) -> None:
        """Begin waiting requests, in order, as far as the budget goes."""
        waiting = self._next()
        while waiting:
            options = next(iter(waiting))
            entries, group = waiting.pop(options), self._running.get(options)
            try:
                with self._failing(options, [*entries, *(group.entries if group else ())]):
                    decoding = self._begin(entries)
                    if group is None:
                        self._running[options] = _Group(decoding, entries)
                    else:
                        group.decoding.join(decoding)
                        group.add(entries)
            except BaseException:
                self._put_back(waiting)
                raise

    def _next(self) -> dict[SearchOptions, list[Entry]]:
        """The waiting entries that there is room for, by their options."""
        found: dict[SearchOptions, list[Entry]] = {}
        with self._lock:
            if self._waiting:
                used = sum(entry.cost for group in self._running.values() for entry in group.entries)
                for entry in list(self._waiting):
                    if used and used + entry.cost > self._budget:
                        break
                    used += entry.cost
                    del self._waiting[entry]
                    found.setdefault(entry.request.options, []).append(entry)
        return found

    def _put_back(self, waiting: dict[SearchOptions, list[Entry]]) -> None:
        with self._lock:
            back = {entry: None for entries in waiting.values() for entry in entries if not entry.cancelled}
            self._waiting = {**back, **self._waiting}

    def _advance(self, options: SearchOptions, group: _Group[Kind]) -> None:
        with self._failing(options, group.entries):
            for entry, hypotheses in group.decoding.advance():
                del group.entries[entry]
                self._told.append((entry, Finished(entry.request.id, hypotheses)))
            if group.tells:
                asking = [entry for entry in group.entries if entry.request.partial]
                self._told += [(entry, Partial(entry.request.id, group.decoding.partial(entry))) for entry in asking]
        if not group.entries:
            del self._running[options]

    def _tell(self) -> list[Event]:
        """What there is to tell of requests that nobody cancelled; the ids of finished ones become free."""
        with self._lock:
            told, self._told = [(entry, event) for entry, event in self._told if not entry.cancelled], []
            for entry, event in told:
                if isinstance(event, Finished):
                    del self._entries[entry.request.id]
        return [event for _, event in told]

    @contextlib.contextmanager
    def _failing(self, options: SearchOptions, entries: Iterable[Entry]) -> Iterator[None]:
        """Where the block raises, the decoding of these options may be half-way: it and its requests, those in `entries` by then, are gone."""
        try:
            yield
        except BaseException:
            self._running.pop(options, None)
            with self._lock:
                for entry in entries:
                    if not entry.cancelled:
                        entry.cancelled = True
                        del self._entries[entry.request.id]
            raise
