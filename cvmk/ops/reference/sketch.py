"""The sketch of distinct elements in plain Python: the law for csrc/sketch, equal to it bit for bit, and the fallback.

All arithmetic is modulo 2^64. With G = 0x9E3779B97F4A7C15 and mix64 the finalizer of splitmix64 (Steele, Lea, Flood 2014):

    key_k        = mix64(seed + k G), k = 1 ... 5
    hash(id)     = mix64((id xor key_1) G + key_2)           a bijection: two ids never share a hash
    draw(n)      = mix64(key_3 + n G)                        for the n-th occurrence in the stream, n = 0, 1, ...
    fold(a, b)   = high word xor low word of the 128-bit product a b
    bytes -> id  = h, where h = key_4 xor length, then for each 16 bytes (little-endian words w0, w1; the last block filled with
                   zeros) h = mix64(fold(w0 xor key_5, w1 xor h))

Steps for an occurrence of a, u = draw(n) (random) or hash(a) (hash), from Knuth, "The CVM Algorithm for Estimating Distinct
Elements in Streams" (2023), Algorithm D:

    D3 (random) take a out of the buffer          (hash) if a is in the buffer, count it and stop
    D4 if u > limit: stop. If the buffer has room: put (a, u) in and stop
    D5 (a', u') = the largest of the buffer by (u, a). If u > u': limit = u - 1. Else (a, u) replaces it and limit = u' - 1

The threshold of the paper is p = (limit + 1) / 2^64; limit is 2^64 - 1 at the start.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix64(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def fold(a: int, b: int) -> int:
    product = a * b
    return (product >> 64) ^ (product & MASK)


class ReferenceSketch:
    """The interface of `cvmk._native.Sketch`: capacity >= 1, seed in [0, 2^64)."""

    def __init__(self, capacity: int, hashed: bool, seed: int) -> None:
        self._capacity, self._hashed = capacity, hashed
        self._keys = [mix64((seed + k * GAMMA) & MASK) for k in range(1, 6)]
        self._clear()

    def _clear(self) -> None:
        self._seen, self._limit = 0, MASK
        self._priorities: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._items: dict[int, bytes] | None = None
        self._heap: list[tuple[int, int]] = []  # (-priority, -id); entries that left or changed stay until they reach the top

    # -- feeding ---------------------------------------------------------------------------------------------------------------
    def add(self, ids: np.ndarray) -> None:
        """One occurrence of each id; uint64 [n]."""
        if self._hashed:
            hashes = self._hashes(ids)
            near = hashes <= np.uint64(self._limit)  # the limit only falls, so the others can never enter
            for id_, hash_ in zip(ids[near].tolist(), hashes[near].tolist(), strict=True):
                self._step_hash(id_, hash_)
        else:
            positions = np.arange(len(ids), dtype=np.uint64) + np.uint64(self._seen)
            draws = _mix64_array(positions * np.uint64(GAMMA) + np.uint64(self._keys[2]))
            for id_, draw in zip(ids.tolist(), draws.tolist(), strict=True):
                self._step_random(id_, draw)
        self._seen += len(ids)

    def add_packed(self, buffer: np.ndarray, offsets: np.ndarray) -> None:
        """One occurrence of each byte string buffer[offsets[i] : offsets[i + 1]]; uint8 [m], int64 [n + 1].

        Raises ValueError where the offsets do not rise within the buffer.
        """
        if not len(offsets) or offsets[0] < 0 or offsets[-1] > len(buffer) or (np.diff(offsets) < 0).any():
            raise ValueError("offsets must rise from 0 or more to at most the length of the buffer")
        data, bounds = buffer.tobytes(), offsets.tolist()
        self.add_items([data[begin:end] for begin, end in itertools.pairwise(bounds)])

    def add_items(self, items: list[bytes | str]) -> None:
        """One occurrence of each item; a str stands for its UTF-8 bytes. Raises TypeError, and takes none, where one is neither."""
        encoded = [_encoded(item) for item in items]
        if encoded and self._items is None:
            self._items = {}
        for item in encoded:
            id_ = self._fingerprint(item)
            if self._hashed:
                entered = self._step_hash(id_, self._hash(id_))
            else:
                entered = self._step_random(id_, mix64((self._keys[2] + self._seen * GAMMA) & MASK))
            self._seen += 1
            if entered and self._items is not None:
                self._items[id_] = item

    def _step_random(self, id_: int, draw: int) -> bool:
        if id_ in self._priorities:
            if draw > self._limit:
                self._remove(id_)
            else:  # taken out and put in again: there is room
                self._put(id_, draw, 0)
            return False
        return draw <= self._limit and self._admit(id_, draw, 0)

    def _step_hash(self, id_: int, hash_: int) -> bool:
        if id_ in self._priorities:
            self._counts[id_] += 1
            return False
        return hash_ <= self._limit and self._admit(id_, hash_, 1)

    # -- the buffer ------------------------------------------------------------------------------------------------------------
    def _admit(self, id_: int, priority: int, count: int) -> bool:
        if len(self._priorities) == self._capacity:
            largest, last = self._largest()
            if priority > largest:
                self._limit = priority - 1
                return False
            self._limit = max(largest - 1, 0)
            self._remove(last)
        self._put(id_, priority, count)
        return True

    def _put(self, id_: int, priority: int, count: int) -> None:
        self._priorities[id_], self._counts[id_] = priority, count
        heapq.heappush(self._heap, (-priority, -id_))
        if len(self._heap) > 2 * len(self._priorities) + 64:
            self._heap = [(-u, -a) for a, u in self._priorities.items()]
            heapq.heapify(self._heap)

    def _largest(self) -> tuple[int, int]:
        while True:
            priority, id_ = -self._heap[0][0], -self._heap[0][1]
            if self._priorities.get(id_) == priority:
                return priority, id_
            heapq.heappop(self._heap)

    def _remove(self, id_: int) -> None:
        del self._priorities[id_], self._counts[id_]
        if self._items is not None:
            self._items.pop(id_, None)

    # -- hashes ----------------------------------------------------------------------------------------------------------------
    def _hash(self, id_: int) -> int:
        return mix64(((id_ ^ self._keys[0]) * GAMMA + self._keys[1]) & MASK)

    def _hashes(self, ids: np.ndarray) -> np.ndarray:
        return _mix64_array((ids ^ np.uint64(self._keys[0])) * np.uint64(GAMMA) + np.uint64(self._keys[1]))

    def _fingerprint(self, item: bytes) -> int:
        h = self._keys[3] ^ len(item)
        for begin in range(0, len(item), 16):
            first, second = item[begin : begin + 8], item[begin + 8 : begin + 16]
            h = mix64(fold(int.from_bytes(first, "little") ^ self._keys[4], int.from_bytes(second, "little") ^ h))
        return h

    # -- what it knows ---------------------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self._priorities)

    def seen(self) -> int:
        return self._seen

    def limit(self) -> int:
        return self._limit

    def state(self) -> dict[str, Any]:
        """Everything, sorted by (priority, id), so that equal streams give equal states."""
        order = sorted(self._priorities, key=lambda id_: (self._priorities[id_], id_))
        return {
            "seen": self._seen,
            "limit": self._limit,
            "ids": _array(order),
            "priorities": _array(self._priorities[id_] for id_ in order),
            "counts": _array(self._counts[id_] for id_ in order),
            "items": None if self._items is None else [self._items[id_] for id_ in order],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state. Raises ValueError where it cannot be one of this sketch."""
        ids, priorities, counts = (state[key].tolist() for key in ("ids", "priorities", "counts"))
        items: list[bytes] | None = state["items"]
        lengths = {len(ids), len(priorities), len(counts), len(ids if items is None else items)}
        if len(lengths) > 1 or len(ids) > self._capacity:
            raise ValueError("the state holds arrays of different lengths or more items than the capacity")
        if any(count > state["seen"] for count in counts):
            raise ValueError("the state counts more occurrences of an item than came")
        if any(priority > state["limit"] or (self._hashed and priority != self._hash(id_)) for id_, priority in zip(ids, priorities, strict=True)):
            raise ValueError("the state holds a priority that this seed and threshold cannot give")
        if len(set(ids)) < len(ids):
            raise ValueError("the state holds an id twice")
        self._clear()
        self._seen, self._limit = state["seen"], state["limit"]
        for id_, priority, count in zip(ids, priorities, counts, strict=True):
            self._put(id_, priority, count)
        if items is not None:
            self._items = dict(zip(ids, items, strict=True))

    def merge(self, other: ReferenceSketch) -> None:
        """Become the sketch of both streams; hash priorities, one seed, other's capacity at least this one's."""
        state = other.state()
        self._limit = min(self._limit, state["limit"])
        for id_ in [id_ for id_, priority in self._priorities.items() if priority > self._limit]:
            self._remove(id_)
        if state["items"] is not None and self._items is None:
            self._items = {}
        rows = zip(state["ids"].tolist(), state["priorities"].tolist(), state["counts"].tolist(), strict=True)
        for row, (id_, priority, count) in enumerate(rows):
            if id_ in self._priorities:
                self._counts[id_] += count
            elif priority <= self._limit and self._admit(id_, priority, count) and state["items"] is not None and self._items is not None:
                self._items[id_] = state["items"][row]
        self._seen += state["seen"]


def _mix64_array(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return z


def _encoded(item: bytes | str) -> bytes:
    if isinstance(item, str):
        return item.encode("utf-8")
    if isinstance(item, bytes):
        return item
    raise TypeError(f"items must be bytes or str, not {type(item).__name__}")


def _array(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.uint64)
