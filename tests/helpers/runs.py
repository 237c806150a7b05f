"""Runs of `cvmk train` seen from outside: their commands and what they leave on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cvmk.config.loading import load_train_config
from cvmk.config.overrides import with_overrides
from cvmk.files import pointed
from cvmk.telemetry import Reporter
from cvmk.training import pipeline
from cvmk.training.trainer import Trainer


def command(*arguments: Any) -> list[str]:
    """The command line of cvmk in a process of its own."""
    return [sys.executable, "-m", "cvmk", *map(str, arguments)]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def last_step(folder: Path) -> int:
    """The iteration that a run would resume from; -1 where it has no checkpoint."""
    name = pointed(folder / "checkpoints" / "last")
    return int(name.removeprefix("step-")) if name else -1


def train(
    path: Path, *overrides: str, on_step: Callable[[Trainer], None] | None = None, monkeypatch: pytest.MonkeyPatch | None = None, resume: bool = False
) -> dict[str, Any]:
    """Train in this process; `on_step` is called after every optimiser step, before anything looks at it."""
    if on_step is not None:
        assert monkeypatch is not None
        original = Trainer._step

        def step(trainer: Trainer) -> Any:
            found = original(trainer)
            on_step(trainer)
            return found

        monkeypatch.setattr(Trainer, "_step", step)
    threads = torch.get_num_threads()
    try:
        return pipeline.train(load_train_config(path, overrides), with_overrides(path.read_text(), overrides), Reporter(), resume=resume)
    finally:
        torch.set_num_threads(threads)
