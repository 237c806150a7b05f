"""Reading `events.jsonl`: of any age, whole or cut, while it grows."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from cvmk.files import explained
from cvmk.telemetry.schema import KINDS, Record, Unknown

_PROBLEMS = 20
"""Broken lines that are named; the others are counted."""


class EventReader:
    """Reads what has been added since the last call, as far as it is whole; what cannot be read is told by `problems`, not raised."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._position = self._line = 0
        self._unknown: Counter[tuple[str, str]] = Counter()
        self._broken: list[str] = []
        self._more = 0
        self._rest = b""

    def read(self) -> list[Record]:
        """The new events, in order. A last line without its end is left for the next call. Raises DataError where the file cannot be read."""
        with explained(self.path, "read"), open(self.path, "rb") as file:
            file.seek(self._position)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._position += end
        self._rest = data[end:]
        return [record for line in data[:end].split(b"\n")[:-1] if (record := self._record(line)) is not None]

    def problems(self) -> list[str]:
        """What could not be read so far, a sentence each."""
        found = [
            f"{self.path}: {count} events {kind!r} of version {version} are passed over, "
            + (f"this cvmk reads them up to version {KINDS[kind].VERSION}" if kind in KINDS else "this cvmk does not know them")
            for (kind, version), count in self._unknown.items()
        ]
        found += self._broken
        if self._more:
            found.append(f"{self.path}: {self._more} more lines cannot be read")
        if self._rest:
            found.append(f"{self.path} line {self._line + 1} is cut off: it is left out")
        return found

    def _record(self, line: bytes) -> Record | None:
        self._line += 1
        if not line.strip():
            return None
        try:
            return Record.from_json(json.loads(line))
        except Unknown as unknown:
            self._unknown[unknown.kind, str(unknown.version)] += 1
        except (ValueError, TypeError, RecursionError) as error:
            reason = "it is no JSON, as where a run was killed" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else str(error)
            if len(self._broken) < _PROBLEMS:
                self._broken.append(f"{self.path} line {self._line} is left out: {reason}")
            else:
                self._more += 1
        return None


def read_events(path: str | os.PathLike[str]) -> tuple[list[Record], list[str]]:
    """All events of a file, and what could not be read, a sentence each. Raises DataError where the file cannot be read at all."""
    reader = EventReader(path)
    return reader.read(), reader.problems()
