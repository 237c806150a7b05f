"""How a call on a GPU is timed: events around it with the L2 cache flushed before, replays of a CUDA graph for short ones, and host time."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH = 256 * 2**20
"""Bytes written before a timed call: several times the L2 cache, so that inputs come from memory."""
SHORT = 50e-6
"""Calls below so many seconds are timed as a graph's replay too, for the host cannot launch them as fast as they run."""


def seconds(call: Callable[[], Any], budget: float) -> float:
    """Median seconds of one call on the device, in about `budget` seconds. On the CPU (a dry run) wall time of two calls."""
    if not torch.cuda.is_available():
        return statistics.median(_wall(call) for _ in range(2))
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    flush = torch.empty(FLUSH // 4, dtype=torch.int32, device="cuda")
    first = _events(call, flush, 3)
    rounds = max(5, min(200, int(budget / max(statistics.median(first), 1e-5) / 2)))
    return statistics.median(_events(call, flush, rounds))


def graph_seconds(call: Callable[[], Any], budget: float) -> float | None:
    """The same by replaying a CUDA graph of the call: without the host's part. None where the call cannot be captured."""
    if not torch.cuda.is_available():
        return None
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except Exception:  # a call that waits for the device, or allocates outside of the pool: capture refuses it in many ways
        torch.cuda.synchronize()
        return None
    return seconds(graph.replay, budget)


def host_seconds(call: Callable[[], Any], budget: float) -> float:
    """Median seconds that the host spends in a call, with an idle device before each."""
    for _ in range(3):
        call()
    samples: list[float] = []
    end = time.perf_counter() + budget
    while len(samples) < 5 or (time.perf_counter() < end and len(samples) < 1000):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        samples.append(_wall(call))
    return statistics.median(samples)


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Bytes that a call allocates at most, beyond what is there before it."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _wall(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _events(call: Callable[[], Any], flush: torch.Tensor, rounds: int) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def ceilings() -> dict[str, float]:
    """What this device reaches in practice: bytes a second of a copy (read and written), operations a second of a bfloat16 product."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds(lambda: target.copy_(source), 0.5)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return {"copy_bytes_a_second": copied, "bf16_operations_a_second": 2 * 8192**3 / seconds(lambda: a @ b, 0.5)}


if __name__ == "__main__":
    print(json.dumps(ceilings()))
