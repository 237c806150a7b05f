"""Which engine runs a model: each is asked in turn, and answers with reasons where it cannot.

An engine is a module `cvmk.inference.<name>_engine`, named in ENGINES, that has
    refusals(manifest, device, compute_type) -> list[str]    why it cannot run the model so, in sentences; empty where it can
    load(folder, manifest, device, compute_type, threads) -> Engine
    of_model(model) -> Engine                                with the weights that a model in memory has at present
and is imported when it is asked. compute_type is one that it was asked about: "auto" has become what the weights are stored in.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvmk.errors import ConfigError
from cvmk.formats import Manifest
from cvmk.formats.manifest import FLOATS
from cvmk.inference.engine import Engine

if TYPE_CHECKING:
    from cvmk.nn import CVMTransformer

ENGINES = ("native", "torch")
"""The engines, the preferred one first."""


@dataclass(frozen=True)
class EngineAnswer:
    """An engine, why it cannot run the model (nothing where it can), and whether it does."""

    engine: str
    reasons: tuple[str, ...]
    chosen: bool


def build(folder: Path, manifest: Manifest, device: str, compute_type: str, engine: str = "auto", threads: int | None = None) -> tuple[str, Engine]:
    """The first engine that can run the model, or the one that `engine` names: its name, and itself.

    Raises ConfigError, with every reason, where none can, and DataError where the folder is not sound.
    """
    compute_type = stored_type(manifest, compute_type)
    if engine not in ("auto", *ENGINES):
        raise ConfigError(f"engine is {engine!r}, and must be one of {', '.join(('auto', *ENGINES))}")
    refused: list[str] = []
    for name, module in _modules():
        if engine in ("auto", name):
            reasons = module.refusals(manifest, device, compute_type)
            if not reasons:
                return name, module.load(folder, manifest, device, compute_type, threads)
            refused += reasons
    raise ConfigError("; ".join(refused))


def explain(manifest: Manifest, device: str, compute_type: str, chosen: str) -> list[EngineAnswer]:
    """Every engine with its reasons; `chosen` names the one that runs the model."""
    compute_type = stored_type(manifest, compute_type)
    return [EngineAnswer(name, tuple(module.refusals(manifest, device, compute_type)), name == chosen) for name, module in _modules()]


def of_model(model: CVMTransformer) -> tuple[str, Engine]:
    """The first engine that can run a model in memory as it is, and its name; the engine has the model's present weights."""
    from cvmk.formats.torch_weights import manifest_of

    manifest, weight = manifest_of(model), next(model.parameters())
    for name, module in _modules():
        if not module.refusals(manifest, weight.device.type, str(weight.dtype).removeprefix("torch.")):
            return name, module.of_model(model)
    from cvmk.inference.torch_engine import TorchEngine

    return "torch", TorchEngine(model)  # in a dtype that it would not convert to


def stored_type(manifest: Manifest, compute_type: str) -> str:
    """What "auto" means for a model: the type that most of its floating weights are stored in, where an engine computes in it, else float32; quantised weights
    are multiplied as they are stored whatever it is. "bf16" is bfloat16."""
    if compute_type == "auto":
        schemes = manifest.schemes
        floats = [] if schemes is None else [scheme.type for scheme in (schemes.default, *schemes.weights.values()) if scheme.type in FLOATS]
        return "bfloat16" if floats[:1] == ["bfloat16"] else "float32"
    return {"bf16": "bfloat16"}.get(compute_type, compute_type)


def _modules() -> Iterator[tuple[str, Any]]:
    for name in ENGINES:
        yield name, importlib.import_module(f"cvmk.inference.{name}_engine")
