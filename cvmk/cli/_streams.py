"""The standard streams of a verb."""

from __future__ import annotations

from cvmk.errors import DataError


def need_open(stream: object, name: str, remedy: str = "open it") -> None:
    """Raises DataError where `stream`, standard `name`, was closed when the process began: what is printed would be lost without a word."""
    if stream is None:
        raise DataError(f"standard {name} is closed: {remedy}")
