"""Which block sizes a kernel runs with: the user's table, else the measured table of the device class, else a heuristic.

A tuned kernel has a name and a key (a short text such as "bfloat16 d64"). Tables are JSON files {"<kernel>": {"<key>": {"BLOCK_M": 128,
"num_warps": 8, ...}}}: `tables/sm_<capability>.json` beside this file for what was measured, and the user's own, which
`cvmk bench --tune` writes, at CVMK_TUNING or in the user's cache folder. Nothing is ever tuned during a call.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cvmk.ops.triton._launch import capability

Config = dict[str, int]
_overrides: dict[tuple[str, str], Config] = {}
_asked: list[set[tuple[str, str]]] = []


@dataclass(frozen=True)
class Tuned:
    """A kernel with a choice of block sizes.

    heuristic   (key, capability) -> the configuration where no table has one
    candidates  (key, capability) -> the configurations that `cvmk bench --tune` tries; the heuristic's is tried in any case
    """

    name: str
    heuristic: Callable[[str, tuple[int, int]], Config]
    candidates: Callable[[str, tuple[int, int]], list[Config]]

    def config(self, key: str, device: torch.device) -> Config:
        """The configuration for a call: constants and `num_warps`, `num_stages`, to be passed to `launch`."""
        for asked in _asked:
            asked.add((self.name, key))
        found = _overrides.get((self.name, key))
        return found if found is not None else _config(self, key, capability(device))


@functools.cache
def _config(tuned: Tuned, key: str, capability: tuple[int, int]) -> Config:
    for path in (user_table(capability), packaged_table(capability)):
        found = _table(path).get(tuned.name, {}).get(key)
        if found is not None:
            return dict(found)
    return tuned.heuristic(key, capability)


def packaged_table(capability: tuple[int, int]) -> Path:
    return Path(__file__).parent / "tables" / f"sm_{capability[0]}{capability[1]}.json"


def user_table(capability: tuple[int, int]) -> Path:
    """CVMK_TUNING, a folder; without it `cvmk/tuning` in XDG_CACHE_HOME or ~/.cache."""
    folder = os.environ.get("CVMK_TUNING")
    base = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cvmk" / "tuning"
    return base / f"sm_{capability[0]}{capability[1]}.json"


@functools.cache
def _table(path: Path) -> dict[str, dict[str, Config]]:
    try:
        table: dict[str, dict[str, Config]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no table of kernel configurations ({error}): delete it or write it again with cvmk bench --tune") from None
    return table


def merged(table: dict[str, dict[str, Config]], newer: dict[str, dict[str, Config]]) -> dict[str, dict[str, Config]]:
    """`table` with what `newer` says about the same kernels and keys put in its place."""
    return table | {kernel: table.get(kernel, {}) | keys for kernel, keys in newer.items()}


def forget() -> None:
    """Read the tables anew at the next call."""
    _table.cache_clear()
    _config.cache_clear()


@contextlib.contextmanager
def overriding(kernel: str, key: str, config: Config) -> Iterator[None]:
    """Run `kernel` with `config` where its key is `key`, while the block runs."""
    _overrides[kernel, key] = config
    try:
        yield
    finally:
        del _overrides[kernel, key]


@contextlib.contextmanager
def noting() -> Iterator[set[tuple[str, str]]]:
    """The set of (kernel, key) that calls in the block ask for."""
    asked: set[tuple[str, str]] = set()
    _asked.append(asked)
    try:
        yield asked
    finally:
        _asked.remove(asked)
