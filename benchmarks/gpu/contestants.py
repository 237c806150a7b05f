"""GPU benchmarks of one op family: `PYTHONPATH=benchmarks python -m gpu.contestants MODULE --out FILE`, of bench_gpu_<MODULE>.py beside this file.

Such a file has `rows(device, small)`, an iterator of `Row`: a case at a time, with its tensors, so that one case is in memory; and it may
have `errors(device, small)`, which returns numbers by name for the report, such as errors against float64. Every backend of cvmk that
takes the call is timed, then the peers; a contestant that fails is a line that says why. FILE is written after every row, so that a run
that is stopped keeps what it has. Without a GPU (or with --small) shapes are tiny: that only shows that the rows run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu.timing import SHORT, graph_seconds, host_seconds, peak_bytes, seconds

MEMORY, BF16, INT8 = 4.8e12, 989e12, 1979e12
"""Bytes and operations a second of an H200, to which shares of the limit refer."""


@dataclass
class Row:
    """One case. `ours` is timed on each of cvmk's backends in turn, `peers` as they are; a peer may be a text that says why it is not there.

    operations, rate   what must be computed and how fast the device can, for the limit and for TFLOP/s
    traffic            bytes that must be moved, for the limit and for GB/s
    targets            what the case has to reach: (name of a peer, or "best peer", the ratio), ("limit", the share of it), ("picoseconds", for
                       one of `elements`, at most) or ("host", seconds at most)
    memory, host       whether the bytes that a call allocates, and the host's time for it, are measured too
    arguments          calls `ops.explain` for the case: every backend is timed that does not decline; without it those that are chosen
    """

    op: str
    case: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any] | str] = field(default_factory=dict)
    operations: float = 0.0
    rate: float = BF16
    traffic: float = 0.0
    targets: tuple[tuple[str, float], ...] = ()
    elements: float = 0.0
    memory: bool = False
    host: bool = False
    arguments: Callable[[], Any] = list


PEERS = True
"""Off where only cvmk's kernels are to run."""


def peer(name: str, make: Callable[[], Callable[[], Any]]) -> Callable[[], Any] | str:
    """The peer that `make` builds, or why it could not be built."""
    if not PEERS:
        return "not asked for"
    try:
        return make()
    except Exception as error:
        return f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def measure(row: Row, budget: float) -> dict[str, Any]:
    """The row's figures as they go into the file."""
    from cvmk import ops

    result: dict[str, Any] = {"op": row.op, "case": row.case, "seconds": {}, "graph_seconds": {}, "host_seconds": {}, "peak_bytes": {}, "failed": {}}
    reasons = {answer.backend: list(answer.reasons) for answer in row.arguments()}
    for name, why in reasons.items():
        for refused in why:
            if "not yet measured" not in refused:  # a backend that only waits to be measured is measured here
                result["failed"][f"cvmk {name}"] = refused
    contestants: list[tuple[str, tuple[str, ...], Callable[[], Any] | str]] = [(name, (), call) for name, call in row.peers.items()]
    able = [name for name in reasons if f"cvmk {name}" not in result["failed"]]
    for name in [name for name in able if name != "reference"] or able:  # the reference only where nothing else takes the call
        contestants.append((f"cvmk {name}", (name, "reference"), row.ours))  # the reference serves a pass that the backend has not
    if not reasons:
        contestants.append(("cvmk as chosen", (), row.ours))
    for name, backends, call in contestants:
        if isinstance(call, str):
            result["failed"][name] = call
            continue
        try:
            with ops.use(*backends) if backends else contextlib.nullcontext():
                _one(name, call, row, result, budget)
        except Exception as error:
            result["failed"][name] = f"{type(error).__name__}: {str(error)[:400]}"
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return result | _judged(row, result)


def _one(name: str, call: Callable[[], Any], row: Row, result: dict[str, Any], budget: float) -> None:
    result["seconds"][name] = seconds(call, budget)
    if result["seconds"][name] < SHORT or row.host:
        replayed = graph_seconds(call, budget)
        if replayed is not None:
            result["graph_seconds"][name] = replayed
    if row.host:
        result["host_seconds"][name] = host_seconds(call, budget)
    if row.memory:
        result["peak_bytes"][name] = peak_bytes(call)


def _judged(row: Row, result: dict[str, Any]) -> dict[str, Any]:
    """The best of cvmk's backends, the limit's share, the ratio to every peer, and whether the target is met."""
    best = {name: min(result["seconds"][name], result["graph_seconds"].get(name, float("inf"))) for name in result["seconds"]}
    ours = {name: value for name, value in best.items() if name.startswith("cvmk ")}
    peers = {name: value for name, value in best.items() if not name.startswith("cvmk ")}
    if not ours:
        return {"ours": None}
    name = min(ours, key=lambda key: ours[key])
    time_ = ours[name]
    limit = max(row.operations / row.rate, row.traffic / MEMORY)
    found: dict[str, Any] = {
        "ours": name,
        "tflops": row.operations / time_ / 1e12 if row.operations else None,
        "gbs": row.traffic / time_ / 1e9 if row.traffic else None,
        "picoseconds": time_ / row.elements * 1e12 if row.elements else None,
        "limit_share": limit / time_ if limit else None,
        "ratios": {other: value / time_ for other, value in peers.items()},
    }
    found["targets"] = [_reached(target, found, result["host_seconds"].get(name)) for target in row.targets if torch.cuda.is_available()]
    return found


def _reached(target: tuple[str, float], found: dict[str, Any], host: float | None) -> dict[str, Any]:
    """A target with what was reached; `met` is None where there was nothing to compare with."""
    against, wanted = target
    reached = {
        "limit": found["limit_share"],
        "best peer": min(found["ratios"].values(), default=None),
        "picoseconds": found["picoseconds"],
        "host": host,
    }.get(against, found["ratios"].get(against))
    at_most = against in ("picoseconds", "host")
    met = None if reached is None else bool(reached <= wanted if at_most else reached >= wanted)
    return {"against": against, "wanted": wanted, "reached": reached, "met": met}


def once(rows: Iterator[Row], backend: str) -> None:
    """Run every case that the backend takes, and say which."""
    from cvmk import ops

    for row in rows:
        refused = [why for answer in row.arguments() if answer.backend == backend for why in answer.reasons if "not yet measured" not in why]
        if refused or backend not in [answer.backend for answer in row.arguments()]:
            print(f"{row.op} {row.case}: not on {backend} {refused}", flush=True)
            continue
        with ops.use(backend, "reference"):
            row.ours()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(f"{row.op} {row.case}: ran on {backend}", flush=True)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line a row: time, rate, share of the limit, ratio to each peer, target."""
    for row in rows:
        if row.get("ours") is None:
            yield f"{row['op']:<24} {row['case']:<44} nothing ran: {row['failed']}"
            continue
        time_ = min(row["seconds"][row["ours"]], row["graph_seconds"].get(row["ours"], float("inf")))
        rate = f"{row['tflops']:7.1f} TFLOP/s" if row["tflops"] else f"{row['gbs']:7.0f} GB/s   " if row["gbs"] else ""
        rate += f" {row['picoseconds']:6.2f} ps" if row.get("picoseconds") else ""
        share = f"{row['limit_share']:5.0%}" if row["limit_share"] else "     "
        ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratios"].items())
        words = {True: "met", False: "BELOW", None: "?"}
        verdict = "".join(f"  {words[target['met']]} ({target['against']} {target['wanted']:g})" for target in row["targets"])
        host = "".join(f"  host {value * 1e6:.1f} us" for name, value in row["host_seconds"].items() if name == row["ours"])
        yield f"{row['op']:<24} {row['case']:<44} {row['ours'][5:]:<9} {time_ * 1e6:10.1f} us {rate} {share}{verdict}{host}  {ratios}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="attention, scan, linear, kd_loss, host or training; several with --once")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=0.25, help="for one contestant of one row")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no further row begins")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--once", metavar="BACKEND", help="time nothing: run each case that this backend takes once, for compute-sanitizer")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    small = arguments.small or not torch.cuda.is_available()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if arguments.once:
        importlib.import_module("gpu.contestants").PEERS = False  # that of the rows, which this file run as a program is not
        for name in arguments.module.split(","):
            once(importlib.import_module(f"gpu.bench_gpu_{name}").rows(device, small), arguments.once)
        return
    report: dict[str, Any] = {"module": arguments.module, "small": small, "complete": False, "rows": []}
    module = importlib.import_module(f"gpu.bench_gpu_{arguments.module}")
    if hasattr(module, "errors"):
        report["errors"] = module.errors(device, small)
        print(report["errors"], flush=True)
    for row in module.rows(device, small):
        report["rows"].append(measure(row, arguments.seconds))
        _write(arguments.out, report)
        print(next(table(report["rows"][-1:])), flush=True)
        del row
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if time.perf_counter() - begun > arguments.limit:
            return
    report["complete"] = True
    _write(arguments.out, report)


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
