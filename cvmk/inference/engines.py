"""Which engine runs a model: each is asked in turn, and answers with reasons where it cannot.

An engine is a module `cvmk.inference.<name>_engine`, named in ENGINES, that has
    refusals(manifest, device, compute_type) -> list[str]    why it cannot run the model so, in sentences; empty where it can
    load(folder, manifest, device, compute_type) -> Engine
and is imported when it is asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvmk.errors import ConfigError
from cvmk.formats import Manifest
from cvmk.inference.engine import Engine

ENGINES = ("torch",)
"""The engines, the preferred one first."""


@dataclass(frozen=True)
class EngineAnswer:
    """An engine, why it cannot run the model (nothing where it can), and whether it does."""

    engine: str
    reasons: tuple[str, ...]
    chosen: bool


def build(folder: Path, manifest: Manifest, device: str, compute_type: str, engine: str = "auto") -> tuple[str, Engine]:
    """The first engine that can run the model, or the one that `engine` names: its name, and itself.

    Raises ConfigError, with every reason, where none can, and DataError where the folder is not sound.
    """
    if engine not in ("auto", *ENGINES):
        raise ConfigError(f"engine is {engine!r}, and must be one of {', '.join(('auto', *ENGINES))}")
    refused: list[str] = []
    for name, module in _modules():
        if engine in ("auto", name):
            reasons = module.refusals(manifest, device, compute_type)
            if not reasons:
                return name, module.load(folder, manifest, device, compute_type)
            refused += reasons
    raise ConfigError("; ".join(refused))


def explain(manifest: Manifest, device: str, compute_type: str, chosen: str) -> list[EngineAnswer]:
    """Every engine with its reasons; `chosen` names the one that runs the model."""
    return [EngineAnswer(name, tuple(module.refusals(manifest, device, compute_type)), name == chosen) for name, module in _modules()]


def _modules() -> Iterator[tuple[str, Any]]:
    for name in ENGINES:
        yield name, importlib.import_module(f"cvmk.inference.{name}_engine")
