"""Run by test_world: three steps in one process, and in two with half of the batches each; what each ends with goes to the folder given."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers")]

from step_setting import Setting, corpus  # noqa: E402

from cvmk.text.batching import TokenBatchSampler  # noqa: E402
from cvmk.training.batches import Batches  # noqa: E402
from cvmk.training.checkpoint import Checkpoint, CheckpointStore  # noqa: E402
from cvmk.training.optimizers.sharpness import SharpnessAware  # noqa: E402
from cvmk.training.world import ProcessGroup, World, current_world  # noqa: E402


def steps(world: World, accumulate: int) -> dict[str, Any]:
    """Of an optimiser that looks at the gradients once, and of one that looks twice."""
    return {"once": three(Setting(teacher=True, clip_norm=0.5, world=world), world, accumulate), "twice": three(twice(world), world, accumulate)}


def twice(world: World) -> Setting:
    setting = Setting(teacher=True, clip_norm=0.5, world=world)
    return setting.driven_by(SharpnessAware(setting.optimizer, 0.05, 0.01))


def three(setting: Setting, world: World, accumulate: int) -> dict[str, Any]:
    found = corpus()
    batches = Batches(found, TokenBatchSampler(found.lengths, 30, seed=3), accumulate, torch.device("cpu"), world)
    results = [setting.step(next(batches), 1.0) for _ in range(3)]
    return {"steps": [(result.loss, result.norm, result.tokens) for result in results], "weights": dict(setting.model.state_dict())}


def one_of_two(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world = current_world()
    assert type(world) is ProcessGroup and (world.rank, world.size, world.writes) == (rank, 2, rank == 0)
    found = steps(world, 1)
    store = CheckpointStore(Path(folder) / "checkpoints", 2, world=world)
    store.save(7, Checkpoint({"w": torch.zeros(1)}, {}, {"progress": {"step": 7}}))
    found |= {"told": world.told({"from": rank}), "newest": store.newest()}
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    target = sys.argv[1]
    torch.set_num_threads(1)
    torch.save(steps(World(), 2), f"{target}/one.pt")
    spawn(one_of_two, (target,), nprocs=2)
