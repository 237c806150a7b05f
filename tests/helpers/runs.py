"""Runs of `cvmk train` seen from outside: their commands and what they leave on disk."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def command(*arguments: Any) -> list[str]:
    """The command line of cvmk in a process of its own."""
    return [sys.executable, "-m", "cvmk", *map(str, arguments)]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def last_step(folder: Path) -> int:
    """The iteration that a run would resume from; -1 where it has no checkpoint."""
    try:
        return int(os.readlink(folder / "checkpoints" / "last").removeprefix("step-"))
    except OSError:
        return -1
