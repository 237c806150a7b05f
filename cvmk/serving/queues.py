"""Fair queues: whose turn it is, by what their work costs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
QUANTUM = 64.0
"""Cost of a turn at weight 1."""
_FIRST = 8
"""How often in a row a flow that had nothing waiting goes before the others."""


@dataclass(eq=False)
class Entry(Generic[T]):
    """Something that waits."""

    flow: Hashable
    cost: int
    item: T
    gone: bool = False


@dataclass(eq=False)
class _Flow(Generic[T]):
    weight: float
    deficit: float
    entries: deque[Entry[T]] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """Deficit round robin over flows by cost (Shreedhar & Varghese 1996), where a flow that had nothing waiting goes first for one turn (RFC 8290): whoever
    asks seldom does not wait for whoever asks much. A flow of a larger weight gets so much more of what there is. No flow waits for ever.
    """

    def __init__(self, quantum: float = QUANTUM) -> None:
        self._quantum = quantum
        self._flows: dict[Hashable, _Flow[T]] = {}
        self._new: deque[Hashable] = deque()
        self._old: deque[Hashable] = deque()
        self._first = 0  # items in a row from new flows
        self.cost = 0
        """Of all that waits."""

    def __len__(self) -> int:
        return sum(not entry.gone for flow in self._flows.values() for entry in flow.entries)

    def push(self, name: Hashable, weight: float, cost: int, item: T) -> Entry[T]:
        """One more at the end of a flow."""
        flow = self._flows.get(name)
        if flow is None:
            flow = self._flows[name] = _Flow(weight, self._quantum * weight)
            self._new.append(name)
        entry = Entry(name, cost, item)
        flow.entries.append(entry)
        self.cost += cost
        return entry

    def remove(self, entry: Entry[T]) -> None:
        """It does not wait any more, nor is it handed out; nothing where it was."""
        if not entry.gone:
            entry.gone = True
            self.cost -= entry.cost

    def pop(self, ready: Callable[[Hashable], bool] = lambda name: True) -> T | None:
        """The next one of those whose flow is `ready`, or None. Flows that are not keep their places."""
        while True:
            order = (self._new, self._old) if self._first < _FIRST else (self._old, self._new)
            found = next(((turns, name) for turns in order for name in turns if ready(name)), None)
            if found is None:
                return None
            turns, name = found
            fresh, flow = turns is self._new, self._flows[name]
            while flow.entries and flow.entries[0].gone:
                flow.entries.popleft()
            if not flow.entries:
                turns.remove(name)
                if fresh:  # once round as an old one: else it would come back as new at once, and go before the others for ever
                    self._old.append(name)
                else:
                    del self._flows[name]
            elif flow.deficit <= 0:
                flow.deficit += self._quantum * flow.weight
                turns.remove(name)
                self._old.append(name)
            else:
                entry = flow.entries.popleft()
                flow.deficit -= entry.cost
                self._first = self._first + 1 if fresh else 0
                self.remove(entry)
                return entry.item
