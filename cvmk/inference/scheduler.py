"""Which requests an engine works on: they wait, begin when there is room, run a step at a time, and leave when they end or are cancelled."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from cvmk.inference.engine import Event, Finished, Partial, Request
from cvmk.inference.options import Hypothesis, SearchOptions


@dataclass(eq=False)
class Entry:
    """A request and whether it was cancelled. Ids come back when a request has ended; entries are each their own."""

    request: Request
    cancelled: bool = False

    @property
    def cost(self) -> int:
        """Source positions times hypotheses: what the budget counts."""
        return (len(self.request.source) + 1) * self.request.options.beam_size


class Decoding(Protocol):
    """Requests of the same options that are decoded together, in whatever way an engine does that."""

    @property
    def entries(self) -> Sequence[Entry]:
        """Those that have not ended."""

    def advance(self) -> Iterable[tuple[Entry, list[Hypothesis]]]:
        """One piece further: the entries that ended, with their hypotheses. They are no longer in it."""

    def partial(self, entry: Entry) -> list[int]:
        """The best hypothesis so far of an entry that is in it."""

    def drop(self, entries: Sequence[Entry]) -> None:
        """Let these go; some others stay."""

    def join(self, other: Self) -> None:
        """Take over the entries of another."""


Kind = TypeVar("Kind", bound=Decoding)


class Scheduler(Generic[Kind]):
    """`submit`, `step` and `cancel` of an engine (see `engine.Engine`) over decodings that `begin` makes of entries with the same options.

    budget bounds the sum of `Entry.cost` of what runs at once; a request beyond it runs alone. Requests begin in the order in which they came.
    """

    def __init__(self, begin: Callable[[Sequence[Entry]], Kind], budget: float) -> None:
        self._begin, self._budget = begin, budget
        self._lock, self._stepping = threading.Lock(), threading.Lock()  # the first guards the fields below
        self._entries: dict[Hashable, Entry] = {}
        self._waiting: dict[Entry, None] = {}
        self._running: dict[SearchOptions, Kind] = {}
        self._told: list[tuple[Entry, Event]] = []

    def submit(self, request: Request) -> None:
        with self._lock:
            if request.id in self._entries:
                raise ValueError(f"the id {request.id!r} is in use by a request that has not ended: cancel that one, or choose another id")
            entry = self._entries[request.id] = Entry(request)
            self._waiting[entry] = None

    def cancel(self, id: Hashable) -> bool:
        with self._lock:
            entry = self._entries.pop(id, None)
            if entry is None:
                return False
            entry.cancelled = True
            self._waiting.pop(entry, None)
            return True

    def step(self) -> list[Event]:
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("another thread is in step(): let one thread at a time step an engine")
        try:
            self._let_go()
            self._admit()
            for options, decoding in list(self._running.items()):
                self._advance(options, decoding)
            return self._tell()
        finally:
            self._stepping.release()

    def _let_go(self) -> None:
        """Take out of the decodings what was cancelled."""
        for options, decoding in list(self._running.items()):
            gone = [entry for entry in decoding.entries if entry.cancelled]
            if len(gone) == len(decoding.entries):
                del self._running[options]
            elif gone:
                with self._failing(options, decoding.entries):
                    decoding.drop(gone)

    def _admit(self) -> None:
        """Begin waiting requests, in order, as far as the budget goes."""
        groups = self._next_groups()
        while groups:
            options = next(iter(groups))
            entries = groups.pop(options)
            running = self._running.get(options)
            try:
                with self._failing(options, [*entries, *(running.entries if running else ())]):
                    new = self._begin(entries)
                    if running is None:
                        self._running[options] = new
                    else:
                        running.join(new)
            except BaseException:
                self._put_back(groups)
                raise

    def _next_groups(self) -> dict[SearchOptions, list[Entry]]:
        used = sum(entry.cost for decoding in self._running.values() for entry in decoding.entries)
        groups: dict[SearchOptions, list[Entry]] = {}
        with self._lock:
            for entry in list(self._waiting):
                if used and used + entry.cost > self._budget:
                    break
                used += entry.cost
                del self._waiting[entry]
                groups.setdefault(entry.request.options, []).append(entry)
        return groups

    def _put_back(self, groups: dict[SearchOptions, list[Entry]]) -> None:
        with self._lock:
            back = {entry: None for entries in groups.values() for entry in entries if not entry.cancelled}
            self._waiting = {**back, **self._waiting}

    def _advance(self, options: SearchOptions, decoding: Kind) -> None:
        with self._failing(options, decoding.entries):
            self._told += [(entry, Finished(entry.request.id, hypotheses)) for entry, hypotheses in decoding.advance()]
            self._told += [(entry, Partial(entry.request.id, decoding.partial(entry))) for entry in decoding.entries if entry.request.partial]
        if not decoding.entries:
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
    def _failing(self, options: SearchOptions, entries: Sequence[Entry]) -> Iterator[None]:
        """Where the block raises, the decoding of these options may be half-way: it and its requests are gone."""
        entries = list(entries)
        try:
            yield
        except BaseException:
            self._running.pop(options, None)
            with self._lock:
                finished = {entry for entry, event in self._told if isinstance(event, Finished)}
                for entry in entries:
                    if not entry.cancelled and entry not in finished:
                        entry.cancelled = True
                        del self._entries[entry.request.id]
            raise
