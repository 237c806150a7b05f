"""CVMSketch: a bounded sample of the distinct elements of a stream, and an unbiased estimate of how many there are."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from cvmk.ops._backend import allowed, no_backend
from cvmk.ops._explain import BackendStatus
from cvmk.ops.native import library, reason
from cvmk.ops.reference.sketch import ReferenceSketch

_MAX_CAPACITY = 2**31
_ITEMS_AT_ONCE = 65_536


class CVMSketch:
    """Keep at most `capacity` distinct elements of a stream of any length, each distinct element with the same probability.

    `priority="random"`: Knuth's Algorithm D ("The CVM Algorithm for Estimating Distinct Elements in Streams", 2023; after
    Chakraborty, Vinodchandran, Meel, ESA 2022). Whether an element is in the sample is decided by a coin at its last occurrence,
    so no assumption on a hash is needed and the sample is drawn anew as elements come again. It cannot be merged or counted.

    `priority="hash"`: bottom-k by a salted hash (KMV). An element once sampled was held since it first occurred, so counts are
    exact; sketches with the same seed can be merged; the sample is the same for every order of the stream.

    In both, p (`threshold`) is the probability of an element to be in the sample, `estimate()` = len / p with the true number as
    its expectation, exact while at most `capacity` distinct elements came; the relative standard deviation is about
    1 / sqrt(capacity).

    A sketch is fed by 64-bit ids (`add`) or by byte strings (`add_bytes`, `add_packed`), not both. Byte strings are told apart by
    a salted 64-bit fingerprint. The same seed gives the same result on every machine and backend, however the stream is cut
    into calls. Several threads may feed one sketch.

    capacity   1 to 2^31 elements
    seed       0 to 2^64 - 1
    backend    attribute, "native" or "reference": chosen like that of any op (`ops.use`, CVMK_BACKEND)

    Raises TypeError or ValueError for wrong arguments, NoBackendError where no allowed backend is there.
    """

    def __init__(self, capacity: int, *, priority: Literal["random", "hash"] = "random", seed: int = 0) -> None:
        self.capacity, self.seed = operator.index(capacity), operator.index(seed)
        if not 1 <= self.capacity <= _MAX_CAPACITY:
            raise ValueError(f"capacity is {self.capacity}: it must be from 1 to {_MAX_CAPACITY}")
        if priority not in ("random", "hash"):
            raise ValueError(f"priority is {priority!r}: it must be 'random' or 'hash'")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}: it must be from 0 to 2^64 - 1")
        self.priority = priority
        self.backend = _choose()
        native: Any = library()
        kind = ReferenceSketch if self.backend == "reference" else native.Sketch
        self._sketch: Any = kind(self.capacity, priority == "hash", self.seed)
        self._feed: str | None = None

    # -- feeding ---------------------------------------------------------------------------------------------------------------
    def add(self, ids: Any) -> None:
        """One occurrence of each id, in order.

        ids   integers of any shape: a NumPy array, a CPU tensor, or a sequence. 64 bits count: -1 is 2^64 - 1.

        Raises TypeError for anything but integers, ValueError for an integer outside [-2^63, 2^64) or a sketch fed by byte strings.
        """
        array = _ids(ids)
        self._fed_by("ids", len(array))
        self._sketch.add(array)

    def add_bytes(self, items: Iterable[bytes | str]) -> None:
        """One occurrence of each item, in order; a str stands for its UTF-8 bytes.

        Raises TypeError for other items and for a single bytes or str, ValueError for a sketch fed by ids.
        """
        if isinstance(items, bytes | bytearray | memoryview | str):
            raise TypeError("add_bytes takes an iterable of items: put a single item into a list")
        iterator = iter(items)
        while group := list(itertools.islice(iterator, _ITEMS_AT_ONCE)):
            self._fed_by("byte strings", len(group))
            self._sketch.add_items(group)

    def add_packed(self, buffer: Any, offsets: Any) -> None:
        """One occurrence of each item of a packed list, the fast way in for many byte strings.

        buffer    bytes or anything with a buffer of bytes
        offsets   int64 [n + 1], rising: item i is buffer[offsets[i] : offsets[i + 1]]

        Raises TypeError for offsets that are no integers, ValueError for offsets outside the buffer or a sketch fed by ids.
        """
        places = np.asarray(offsets)
        if places.dtype.kind not in "iu" or places.ndim != 1:
            raise TypeError(f"offsets must be a flat array of integers, not {places.dtype} with shape {places.shape}")
        self._fed_by("byte strings", len(places) - 1)
        data = np.frombuffer(buffer, dtype=np.uint8) if len(buffer) else np.empty(0, dtype=np.uint8)
        self._sketch.add_packed(data, np.ascontiguousarray(places, dtype=np.int64))

    def _fed_by(self, feed: str, count: int) -> None:
        if count > 0:
            if self._feed not in (None, feed):
                raise ValueError(f"this sketch is fed by {self._feed}: use another one for {feed}")
            self._feed = feed

    # -- asking ----------------------------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        """How many elements are in the sample."""
        return len(self._sketch)

    @property
    def seen(self) -> int:
        """How many occurrences came."""
        seen: int = self._sketch.seen()
        return seen

    @property
    def threshold(self) -> float:
        """p, the probability of a distinct element to be in the sample: 1 while nothing was left out."""
        limit: int = self._sketch.limit()
        return (limit + 1) / 2**64

    def estimate(self) -> float:
        """The estimated number of distinct elements, len / p; unbiased."""
        return len(self) / self.threshold

    def sample(self) -> np.ndarray | list[bytes]:
        """The sampled elements by rising priority: uint64 [len], or a list of bytes where byte strings were fed."""
        state = self._sketch.state()
        sample: np.ndarray | list[bytes] = state["ids"] if state["items"] is None else state["items"]
        return sample

    def counts(self) -> np.ndarray:
        """How often each element of `sample()` occurred, exactly; uint64 [len]. Raises ValueError for random priorities."""
        if self.priority != "hash":
            raise ValueError(
                "a sketch with random priorities knows no counts, because an element may have left the sample and come back: use priority='hash'"
            )
        counts: np.ndarray = self._sketch.state()["counts"]
        return counts

    def merge(self, other: CVMSketch) -> None:
        """Make this the sketch of both streams, as if it had been fed one after the other.

        Raises ValueError for random priorities, different seeds, a smaller capacity of `other`, or ids against byte strings.
        """
        if not isinstance(other, CVMSketch):
            raise TypeError(f"merge takes a CVMSketch, not {type(other).__name__}")
        if self.priority != "hash" or other.priority != "hash":
            raise ValueError(
                "sketches with random priorities cannot be merged: their coins are independent, so an element of both streams would get two "
                "chances: use priority='hash'"
            )
        if self.seed != other.seed:
            raise ValueError(f"the sketches have the seeds {self.seed} and {other.seed}: only sketches with one seed can be merged")
        if other.capacity < self.capacity:
            raise ValueError(f"a sketch of capacity {other.capacity} left out what one of capacity {self.capacity} keeps: merge into the smaller one")
        if other._feed is not None:
            self._fed_by(other._feed, 1)
        source = other._sketch
        if other.backend != self.backend:
            source = type(self._sketch)(other.capacity, True, other.seed)
            source.restore(other._sketch.state())
        self._sketch.merge(source)

    # -- checkpoints -----------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, of plain integers, uint64 arrays and bytes; the same for every backend."""
        return {"capacity": self.capacity, "priority": self.priority, "seed": self.seed, **self._sketch.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError where it is from a sketch with other arguments or incomplete."""
        missing = {"capacity", "priority", "seed", "seen", "limit", "ids", "priorities", "counts", "items"} - state.keys()
        if missing:
            raise ValueError(f"the state of a sketch has no {sorted(missing)[0]!r}: it is incomplete")
        for key in ("capacity", "priority", "seed"):
            if state[key] != getattr(self, key):
                raise ValueError(f"the state is from a sketch with {key} {state[key]!r}, this one has {getattr(self, key)!r}")
        arrays = {key: _ids(state[key]) for key in ("ids", "priorities", "counts")}
        items = None if state["items"] is None else [bytes(item) for item in state["items"]]
        self._sketch.restore({"seen": int(state["seen"]), "limit": int(state["limit"]), **arrays, "items": items})
        self._feed = "byte strings" if items is not None else "ids" if state["seen"] else None


def sketch_backends() -> list[BackendStatus]:
    """The backends of CVMSketch, the preferred one first, and whether they can run in this process."""
    why = reason()
    return [BackendStatus("native", why is None, () if why is None else (f"native: {why}",)), BackendStatus("reference", True)]


def _choose() -> str:
    there = {status.backend: status for status in sketch_backends()}
    names = allowed() or tuple(there)
    for name in names:
        if name in there and there[name].available:
            return name
    refusals = [reason for name in names if name in there for reason in there[name].reasons]
    raise no_backend("CVMSketch", refusals)


def _ids(ids: Any) -> np.ndarray:
    """uint64 [n], contiguous."""
    if isinstance(ids, list | tuple | range):
        try:
            return np.fromiter((operator.index(value) for value in ids), dtype=np.int64, count=len(ids)).view(np.uint64)
        except OverflowError:
            return np.fromiter((_wrapped(value) for value in ids), dtype=np.uint64, count=len(ids))
    array = np.asarray(ids)
    if array.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, not {array.dtype}")
    return np.ascontiguousarray(array.reshape(-1).astype(np.uint64 if array.dtype.kind == "u" else np.int64, copy=False)).view(np.uint64)


def _wrapped(value: Any) -> int:
    number = operator.index(value)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"the id {number} has more than 64 bits")
    return number % 2**64
