"""`cvmk train --profile`: where the time of a step goes, by phase and by operation, and a trace for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
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
from cvmk.text.batching import Batch
from cvmk.training.work import phase_products

FOLDER, TABLE, TRACE = "profile", "profile.txt", "trace.json"
PHASES = ("data", "teacher", "forward", "loss", "backward", "optimiser")
SKIPPED, WATCHED = 10, 20
"""Iterations of a process that pass before it looks, for the first ones are slower, and that it looks at."""
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
    ) -> None:
        self._folder, self._student, self._teacher, self._vocabulary = folder / FOLDER, student, teacher, vocabulary
        self._parameters, self._dtype, self._device, self._say = parameters, dtype, device, say
        self._seen, self._tokens, self._work = 0, 0, defaultdict[str, float](float)
        self._profiler: torch.profiler.profile | None = None
        self._ends = contextlib.ExitStack()

    @contextlib.contextmanager
    def iteration(self) -> Iterator[None]:
        """Around one iteration."""
        if self._seen == SKIPPED:
            self._begin()
        yield
        self._seen += 1
        if self._seen == SKIPPED + WATCHED:
            self.finish()

    def took(self, batches: Sequence[Batch], tokens: int) -> None:
        """What the iteration computed."""
        if self._profiler is not None:
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
        seconds, iterations = time.perf_counter() - self._start, self._seen - SKIPPED
        self._ends.close()
        if iterations < 1:
            return
        table = self._table(profiler, seconds, iterations)
        with explained(self._folder, "write the profile"):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(self._folder / TABLE, table + "\n")
            profiler.export_chrome_trace(str(self._folder / TRACE))
        self._say(f"{table}\n{self._folder / TRACE} has every call: open it at ui.perfetto.dev")

    def _table(self, profiler: torch.profiler.profile, seconds: float, iterations: int) -> str:
        limits = Limits.measured(self._dtype, self._device)
        events = profiler.key_averages()
        total = {event.key: event.cpu_time_total * 1e-6 for event in events if event.key in PHASES}
        least = {phase: self._work[phase] / limits.operations for phase in PHASES}
        least["optimiser"] = iterations * 7 * 4 * self._parameters / limits.bytes  # AdamW reads gradient, weight and moments; writes the last three
        first, last = SKIPPED + 1, SKIPPED + iterations
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
