"""CVMSketch beside exact counting and, where the package `datasketches` is installed, the theta sketch of Apache DataSketches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cvmk import ops

IDS = 2_000_000
WORDS = 200_000
CAPACITY = 4096


def stream(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "distinct":
        return np.arange(IDS, dtype=np.uint64)
    if kind == "zipf":
        return rng.zipf(1.1, IDS).astype(np.uint64)
    return rng.integers(0, 2 * CAPACITY, IDS).astype(np.uint64)  # repeats: half of the distinct ids are in the sample at any time


@pytest.mark.parametrize("priority", ["random", "hash"])
@pytest.mark.parametrize("kind", ["distinct", "zipf", "repeats"])
def test_cpu_sketch_of_ids(compare: Callable[..., Any], kind: str, priority: Any) -> None:
    ids = stream(kind)

    def ours() -> float:
        sketch = ops.CVMSketch(CAPACITY, priority=priority)
        sketch.add(ids)
        return sketch.estimate()

    row = compare(ours, {"numpy unique (exact)": lambda: len(np.unique(ids))}, case=f"sketch {priority} {kind} {IDS // 10**6}M ids")
    assert abs(ours() / len(np.unique(ids)) - 1) < 0.1, row


@pytest.mark.parametrize("priority", ["random", "hash"])
def test_cpu_sketch_of_words(compare: Callable[..., Any], priority: Any) -> None:
    words = [f"word{number}" for number in np.random.default_rng(0).zipf(1.3, WORDS)]

    def ours() -> float:
        sketch = ops.CVMSketch(CAPACITY, priority=priority)
        sketch.add_bytes(words)
        return sketch.estimate()

    peers: dict[str, Callable[[], float]] = {"python set (exact)": lambda: len(set(words))}
    try:
        from datasketches import update_theta_sketch
    except ImportError:
        pass
    else:

        def theta() -> float:
            sketch = update_theta_sketch(12)
            for word in words:
                sketch.update(word)
            return sketch.get_estimate()

        peers["datasketches theta"] = theta
    compare(ours, peers, case=f"sketch {priority} {WORDS // 1000}k words")
