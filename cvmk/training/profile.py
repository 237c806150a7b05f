"""`cvmk train --profile`, `telemetry.profile`: where the time of a step goes, by phase and by operation, and a trace for ui.perfetto.dev."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from cvmk import nvtx
from cvmk.config import ModelConfig
from cvmk.files import explained, write_text
from cvmk.telemetry.schema import Profiled
from cvmk.text.batching import Batch
from cvmk.training.work import phase_products

FOLDER, TABLE, TRACE = "profile", "profile.txt", "trace.json"
PHASES = ("data", "teacher", "forward", "loss", "backward", "optimiser")
WATCHED = 20
"""Iterations that it looks at where the configuration does not say."""
_OPERATIONS = 25


@dataclass(frozen=True)
class Limits:
    """What the machine does at most, measured: operations of matrix products and bytes of memory, a second."""

    operations: float
    bytes: float

    @classmethod
    def measured(cls, dtype: torch.dtype, device: torch.device) -> Limits:
        size = 1024
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        source = torch.zeros(1 << 25, device=device)  # beyond the caches
        target = torch.empty_like(source)
        return cls(2 * size**3 / _seconds(lambda: torch.mm(a, b), device), 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), device))


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The fastest of some calls."""
    found = []
    for _ in range(6):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


class StepProfiler:
    """Watches some iterations of a training, then writes `profile/profile.txt` and `profile/trace.json` into the run's folder, and says the table.

    student, teacher, vocabulary   what the operations of a step are counted from.
    parameters   how many numbers AdamW changes; 0 where the optimiser is another.
    dtype        of matrix products.
    say, told    get the table, and the event.
    skipped, watched   iterations of this process that pass before, for the first ones are slower, and that are watched.
    trace_bytes  of the trace at most: the calls at its end are left out where it would be larger.
    """

    def __init__(
        self,
        folder: Path,
        student: ModelConfig,
        teacher: ModelConfig | None,
        vocabulary: int,
        parameters: int,
        dtype: torch.dtype,
        device: torch.device,
        say: Callable[[str], None],
        told: Callable[[Profiled], None] = lambda event: None,
        *,
        skipped: int = 10,
        watched: int = WATCHED,
        trace_bytes: int = 100_000_000,
    ) -> None:
        self._folder, self._student, self._teacher, self._vocabulary = folder / FOLDER, student, teacher, vocabulary
        self._parameters, self._dtype, self._device, self._say, self._told = parameters, dtype, device, say, told
        self._skipped, self._watched, self._trace_bytes = skipped, watched, trace_bytes
        self._seen, self._step, self._tokens, self._work = 0, 0, 0, defaultdict[str, float](float)
        self._profiler: torch.profiler.profile | None = None
        self._ends = contextlib.ExitStack()

    @contextlib.contextmanager
    def iteration(self) -> Iterator[None]:
        """Around one iteration."""
        if self._seen == self._skipped:
            self._begin()
        yield
        self._seen += 1
        if self._seen == self._skipped + self._watched:
            self.finish()

    def took(self, batches: Sequence[Batch], tokens: int, step: int = 0) -> None:
        """What the iteration computed; `step` is its number."""
        if self._profiler is not None:
            self._step = step
            self._tokens += tokens
            for phase, operations in phase_products(self._student, self._teacher, self._vocabulary, batches).items():
                self._work[phase] += operations

    def _begin(self) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        self._profiler = self._ends.enter_context(torch.profiler.profile(activities=kinds))
        self._ends.enter_context(nvtx.told(record_function))
        self._start = time.perf_counter()

    def finish(self) -> None:
        """Write what was seen, if something was: at the end of the training, where it ends sooner. Raises DataError where that cannot be written."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        seconds, iterations = time.perf_counter() - self._start, self._seen - self._skipped
        self._ends.close()
        if iterations < 1:
            return
        table = self._table(profiler, seconds, iterations)
        with explained(self._folder, "write the profile"):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(self._folder / TABLE, table + "\n")
            kept = _write_trace(profiler, self._folder / TRACE, self._trace_bytes)
        share = "every call" if kept == 1 else f"the first {kept:.0%} of the calls (telemetry.profile_bytes)"
        self._say(f"{table}\n{self._folder / TRACE} has {share}: open it at ui.perfetto.dev")
        self._told(Profiled(self._step - iterations + 1, iterations, [f"{FOLDER}/{TABLE}", f"{FOLDER}/{TRACE}"]))

    def _table(self, profiler: torch.profiler.profile, seconds: float, iterations: int) -> str:
        limits = Limits.measured(self._dtype, self._device)
        events = profiler.key_averages()
        total = {event.key: event.cpu_time_total * 1e-6 for event in events if event.key in PHASES}
        least = {phase: self._work[phase] / limits.operations for phase in PHASES}
        least["optimiser"] = iterations * 7 * 4 * self._parameters / limits.bytes  # AdamW reads gradient, weight and moments; writes the last three
        first, last = self._skipped + 1, self._skipped + iterations
        where = "on the host; a GPU works behind it" if self._device.type == "cuda" else f"{torch.get_num_threads()} threads"
        dtype = str(self._dtype).removeprefix("torch.")
        lines = [
            f"Iterations {first} to {last} of this process: {seconds / iterations * 1e3:.1f} ms each, {self._tokens / seconds:,.0f} target tokens/s ({where})",
            f"limit: {limits.operations / 1e9:,.0f} GFLOP/s in products ({dtype}), {limits.bytes / 1e9:.0f} GB/s, as measured now",
            "",
            f"{'phase':<44}{'ms':>9}{'share':>8}{'of limit':>10}",
        ]
        for phase in PHASES:
            if phase in total:
                share = f"{least[phase] / total[phase]:9.1%}" if least[phase] and total[phase] else ""
                lines.append(f"{phase:<44}{total[phase] / iterations * 1e3:9.2f}{total[phase] / seconds:8.1%}{share:>10}")
        rest = seconds - sum(total.values())
        lines.append(f"{'the loop around them':<44}{rest / iterations * 1e3:9.2f}{rest / seconds:8.1%}")
        lines += ["", f"{'operation (its own time)':<44}{'ms':>9}{'share':>8}{'calls':>8}"]
        own = sorted((event for event in events if event.key not in PHASES), key=lambda event: event.self_cpu_time_total, reverse=True)
        for event in own[:_OPERATIONS]:
            spent = event.self_cpu_time_total * 1e-6
            lines.append(f"{event.key[:43]:<44}{spent / iterations * 1e3:9.2f}{spent / seconds:8.1%}{event.count / iterations:8.1f}")
        return "\n".join(lines)


def _write_trace(profiler: torch.profiler.profile, path: Path, most: int) -> float:
    """Write the trace, whole or not at all, in so many bytes; the share of the calls that are in it."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        whole = Path(folder) / path.name
        profiler.export_chrome_trace(str(whole))
        if whole.stat().st_size <= most:
            os.replace(whole, path)
            return 1.0
        trace = json.loads(whole.read_text(encoding="utf-8"))
    timed = sorted((event for event in trace["traceEvents"] if event.get("ph") != "M"), key=lambda event: float(event.get("ts", 0)))
    trace["traceEvents"] = [event for event in trace["traceEvents"] if event.get("ph") == "M"]
    left = most - len(json.dumps(trace).encode())
    kept = 0
    for event in timed:
        left -= len(json.dumps(event).encode()) + 2
        if left < 0:
            break
        kept += 1
    trace["traceEvents"] += timed[:kept]
    write_text(path, json.dumps(trace))
    return kept / len(timed)
