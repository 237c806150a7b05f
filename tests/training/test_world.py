"""Processes that train one model together take the step of one process with all their batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cvmk.training.checkpoint import Checkpoint, CheckpointStore
from cvmk.training.world import World, current_world

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_a_world_of_one() -> None:
    world = current_world()
    assert type(world) is World and (world.rank, world.size, world.writes) == (0, 1, True)
    value = torch.ones(2)
    world.add_up([value])
    assert value.tolist() == [1, 1] and world.total(3) == 3 and world.told("x") == "x" and world.share([1, 2, 3]) == [1, 2, 3]
    world.wait()


def test_the_shares_are_all_and_each_once() -> None:
    worlds = [World() for _ in range(3)]
    for rank, world in enumerate(worlds):
        world.rank, world.size = rank, 3
    assert sorted(item for world in worlds for item in world.share(list(range(9)))) == list(range(9))
    assert worlds[1].share(list(range(9))) == [1, 4, 7]


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    other = World()
    other.rank, other.size = 1, 2
    store = CheckpointStore(tmp_path, 2, world=other)
    store.save(3, Checkpoint({"w": torch.zeros(1)}, {}, {}), best=True)
    store.point("best", 3)
    store.drop_after(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, SCRIPT, tmp_path], env={**os.environ, "PYTHONFAULTHANDLER": "1"}, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "rank0.pt", "rank1.pt"))
    for kind in ("once", "twice"):
        alone, ours, theirs = (found[kind] for found in (one, first, second))
        assert ours["steps"] == theirs["steps"]
        assert [step[2] for step in ours["steps"]] == [step[2] for step in alone["steps"]]  # tokens
        for step, expected in zip(ours["steps"], alone["steps"], strict=True):
            assert step == pytest.approx(expected, rel=1e-4)
        for name, weight in alone["weights"].items():
            assert torch.equal(ours["weights"][name], theirs["weights"][name]), "the processes hold the same bits"
            torch.testing.assert_close(ours["weights"][name], weight, rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(one["once"]["weights"][name], weight, rtol=1e-3, atol=1e-5) for name, weight in one["twice"]["weights"].items())
    assert first["told"] == second["told"] == {"from": 0} and first["newest"] == second["newest"] == 7
