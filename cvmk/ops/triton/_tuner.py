"""Measuring which block sizes are fastest on this GPU, for `cvmk bench --tune`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from cvmk.ops.triton import _tuning
from cvmk.ops.triton._launch import Case, capability
from cvmk.ops.triton._tuning import Config, Tuned

MARGIN = 1.02
"""How much faster than the present configuration another must be to replace it: less is noise."""

Measure = Callable[[Callable[[], object]], float]


def modules() -> dict[str, ModuleType]:
    """The backend modules with kernels that have block sizes to choose, by name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    found = {name: importlib.import_module(f"cvmk.ops.triton.{name}") for name in names}
    return {name: module for name, module in found.items() if getattr(module, "TUNED", ())}


def tune(chosen: dict[str, ModuleType], device: torch.device, measure: Measure, say: Callable[[str], None]) -> dict[str, dict[str, Config]]:
    """Time every candidate of every key that the modules' cases ask for: a table of the fastest, kernel -> key -> configuration.

    measure  seconds (or any unit) of a call. A candidate that does not compile or run is left out, and `say` tells why.
    """
    table: dict[str, dict[str, Config]] = {}
    for module in chosen.values():
        tuned = {entry.name: entry for entry in module.TUNED}
        for (kernel, key), cases in sorted(_who_asks(module.CASES, device).items()):
            best = _fastest(tuned[kernel], key, cases, device, measure, say)
            table.setdefault(kernel, {})[key] = best
    return table


def _who_asks(cases: tuple[Case, ...], device: torch.device) -> dict[tuple[str, str], list[Case]]:
    found: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        with _tuning.noting() as asked:
            case.run(device)
        for entry in asked:
            found.setdefault(entry, []).append(case)
    return found


def _fastest(tuned: Tuned, key: str, cases: list[Case], device: torch.device, measure: Measure, say: Callable[[str], None]) -> Config:
    """The configuration with the smallest geometric mean over the cases; the present one unless another beats it by MARGIN."""
    present = tuned.config(key, device)
    base = _time(tuned, key, present, cases, device, measure)
    best, smallest = present, base
    tried = [present]
    for candidate in [tuned.heuristic(key, capability(device)), *tuned.candidates(key, capability(device))]:
        if candidate in tried:
            continue
        tried.append(candidate)
        try:
            taken = _time(tuned, key, candidate, cases, device, measure)
        except Exception as error:  # too much shared memory, a compiler's failure: this candidate is not for this GPU
            say(f"{tuned.name} [{key}] {candidate}: left out, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        if taken * MARGIN < base and taken < smallest:
            best, smallest = candidate, taken
    say(f"{tuned.name} [{key}]: {best}, {base / smallest:.2f} times as fast as before, {len(tried)} tried")
    return best


def _time(tuned: Tuned, key: str, config: Config, cases: list[Case], device: torch.device, measure: Measure) -> float:
    with _tuning.overriding(tuned.name, key, config):
        return math.exp(sum(math.log(measure(lambda case=case: case.run(device))) for case in cases) / len(cases))  # type: ignore[misc]
