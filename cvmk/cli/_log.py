"""--log FOLDER: events of a verb, for programs and for people."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cvmk.telemetry import Event


def add_log(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log", metavar="FOLDER", help="write events to events.jsonl and log.txt in this folder, behind what is there")


@contextlib.contextmanager
def events_into(folder: str | None) -> Iterator[Callable[[Event], None]]:
    """What takes events. Raises ConfigError where another process writes in the folder, DataError where nothing can be written there."""
    if folder is None:
        yield lambda event: None
        return
    from cvmk.telemetry import EventStream, RunLog

    events = EventStream(RunLog(Path(folder)))
    try:
        yield events.emit
    finally:
        events.close()
