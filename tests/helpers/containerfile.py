"""docs/deploy/Containerfile, read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Each instruction's name and the rest of its line."""
    text = (ROOT / "docs" / "deploy" / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line and not line.startswith("#")]
