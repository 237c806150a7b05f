"""The harness: cvmk beside its peers, in one process, in turn.

`pytest benchmarks/ --benchmark-only` runs every row; `-k` selects. A row calls `compare(ours, peers, ...)`: after a warm-up each
round times every contestant once, in turn, so that a drift of the machine's speed meets all of them; medians are compared. The table at the
end gives the median times, the ratio to the fastest peer (above 1 = cvmk is faster), and the share of the stated limit.
`--results FILE` writes the rows with the machine and the versions as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import limits
import pytest
import torch

from cvmk import hardware
from cvmk.telemetry import environment

ROWS = pytest.StashKey[list[dict[str, Any]]]()
SAMPLE = 0.02
"""Seconds. A processor that has rested takes milliseconds to come back, which calls of a busy program never see."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=None, metavar="FILE", help="write the rows of the comparison as JSON")
    parser.addoption("--seconds", type=float, default=2.0, help="time for one contestant of one row")


def pytest_configure(config: pytest.Config) -> None:
    if hardware.cpu().emulated:
        raise pytest.UsageError("the native library emulates AMX (CVMK_EMULATE_AMX=ON): times of such a build mean nothing")
    config.stash[ROWS] = []
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(0))  # a slow peer is a figure, not a failure


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["cvmk"] = _machine()


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., dict[str, Any]]:
    """compare(ours, peers, case=..., limit=None): time `ours` against the callables of `peers`, by name.

    limit  the fastest that the hardware allows, in seconds (bytes over bandwidth, or operations over peak), where it is known.
    """

    def run(ours: Callable[[], Any], peers: Mapping[str, Callable[[], Any]], *, case: str, limit: float | None = None) -> dict[str, Any]:
        contestants = {"cvmk": ours, **peers}
        samples = _in_turn(contestants, request.config.getoption("--seconds"))
        medians = {name: statistics.median(values) for name, values in samples.items()}
        best_peer = min(peers, key=lambda name: medians[name]) if peers else None
        row = {
            "case": case,
            "seconds": medians,
            "spread": {name: (max(values) - min(values)) / medians[name] for name, values in samples.items()},
            "rounds": len(samples["cvmk"]),
            "best_peer": best_peer,
            "ratio": medians[best_peer] / medians["cvmk"] if best_peer else None,
            "limit_share": limit / medians["cvmk"] if limit else None,
        }
        benchmark.extra_info.update(row)
        benchmark.pedantic(ours, rounds=5)  # pytest-benchmark's own table; the comparison's figures are those of the row
        request.config.stash[ROWS].append(row)
        return row

    return run


@pytest.fixture
def record_row(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[dict[str, Any]], None]:
    """record_row({"case": ..., "megabytes": {"cvmk": ..., peer: ...}}): a row of memory, which was measured elsewhere."""

    def record(row: dict[str, Any]) -> None:
        benchmark.extra_info.update(row)
        benchmark.pedantic(lambda: None)
        request.config.stash[ROWS].append(row)

    return record


def _in_turn(contestants: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds a call, one sample a round; a sample repeats the call so often that it lasts SAMPLE at least.

    Rounds go there and back, so that nobody always comes after the one that leaves the caches coldest.
    """
    repeats = {}
    for name, function in contestants.items():
        function()
        function()
        repeats[name] = max(1, round(SAMPLE / max(_timed(function, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds * len(contestants)
    order = list(contestants.items())
    while time.perf_counter() < end or len(samples["cvmk"]) < 5:
        for name, function in order:
            samples[name].append(_timed(function, repeats[name]))
        order.reverse()
    return samples


def _timed(function: Callable[[], Any], repeats: int) -> float:
    """Seconds a call; a contestant in another process takes its own time and returns it, a float. Short calls come after one that is not timed."""
    if repeats > 1:
        function()
    start, own = time.perf_counter(), 0.0
    for _ in range(repeats):
        result = function()
        own += result if isinstance(result, float) else 0.0
    if own:
        return own / repeats
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def _machine() -> dict[str, Any]:
    return environment() | {"threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    machine = _machine()
    terminalreporter.section("cvmk beside its peers (median times; ratio above 1 = cvmk is faster)")
    terminalreporter.write_line(f"{machine['processor']}, {machine['threads']} threads, torch {machine['packages']['torch']}, python {machine['python']}")
    width = max(len(row["case"]) for row in rows)
    for row in rows:
        if "megabytes" in row:
            terminalreporter.write_line(f"{row['case']:<{width}}  " + "  ".join(f"{name} {size:9.1f} MB" for name, size in row["megabytes"].items()))
            continue
        peers = "  ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in row["seconds"].items() if name != "cvmk")
        ratio = f"{row['ratio']:6.2f}x" if row["ratio"] else "      -"
        limit = f"{row['limit_share']:6.1%} of limit" if row["limit_share"] else ""
        terminalreporter.write_line(f"{row['case']:<{width}}  cvmk {_milliseconds(row['seconds']['cvmk'])}  {ratio}  {limit}  {peers}")
    path = config.getoption("--results")
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        arguments = [f"benchmarks/results/{Path(path).name}" if argument == path else argument for argument in config.invocation_params.args]
        command = "pytest " + " ".join(arguments)  # without this machine's folders
        Path(path).write_text(json.dumps({"machine": machine, "command": command, "limits": limits.rates(), "rows": rows}, indent=1) + "\n")
        terminalreporter.write_line(f"written to {os.path.relpath(path)}")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:9.3f} ms"
