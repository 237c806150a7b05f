"""Whatever stands in a log, and whatever happens to it while it is followed: what is answered is JSON, and nothing ends."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
from event_logs import lines, start, steps, validation

from cvmk.dashboard.board import Board, Query
from cvmk.telemetry.events import set_aside
from cvmk.telemetry.schema import EVENTS

SOUND = lines(start(), *steps(range(1, 40)), validation(40, 20.0, samples=[{"source": "a", "hypothesis": "b", "reference": "c"}])).splitlines()
STRANGE = [None, True, 0, -1, 1e308, -1e308, 10**400, "x", [], {}, [1, None, "x"], {"a": [1]}, "\ud800", [[1]], [{"index": 0, "use": "x"}], {"loss": "x"}]


def event(random: Random) -> bytes:
    """An event of any kind, most of whose fields are sound."""
    kind = random.choice(EVENTS)
    values: dict[str, Any] = {"time": random.choice([1.7e9 + random.random(), *STRANGE]), "event": kind.KIND, "version": random.choice([1] * 9 + STRANGE)}
    for field in dataclasses.fields(kind):
        name = str(field.type).partition("[")[0].removesuffix(" | None")
        numbers = [random.random() for _ in range(random.randrange(4))]
        sound = {"int": random.randrange(100), "float": random.random(), "str": "s", "bool": True, "list": numbers, "dict": {}}[name]
        values[field.name] = sound if random.random() < 0.85 else random.choice(STRANGE)
    return json.dumps(values).encode() + b"\n"


def happens(log: Path, random: Random) -> None:
    chance = random.random()
    if chance < 0.1:
        os.truncate(log, random.randrange(log.stat().st_size + 1))
    elif chance < 0.15:
        log.rename(log.with_name(f"events.{max(set_aside(log), default=0) + 1}.jsonl"))
        log.touch()
    elif chance < 0.18:
        log.unlink()
        log.touch()
    else:
        with open(log, "ab") as file:
            file.write(random.choice((event(random), event(random), random.choice(SOUND) + b"\n", random.choice(SOUND), random.randbytes(30))))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(40))
def test_any_log(tmp_path: Path, seed: int) -> None:
    random, log = Random(seed), tmp_path / "events.jsonl"
    log.write_bytes(SOUND[0] + b"\n")
    board = Board([str(tmp_path)])
    for _ in range(25):
        happens(log, random)
        for _ in range(random.randrange(4)):
            board.runs[0].advance()
        low, high = random.choice(((None, None), (10.0, 20.0), (1e9, 2e9)))
        json.dumps(board.answer(Query(random.choice(("step", "time")), low, high)), allow_nan=False).encode("utf-8", "replace")
