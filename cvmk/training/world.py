"""The processes that train one model together, each on its share of every step's batches.

All draw the same batches in the same order and take their own (`share`), so that no pair is seen twice. Gradients, losses and tokens are
sums over the processes: the loss divides by the tokens of all of them. Rank 0 alone writes. One process is a world, too, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class World:
    """The world of one process."""

    rank = 0
    size = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes what all share: checkpoints, logs, reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items of this process: every `size`-th one, from the `rank`-th on."""
        return list(items[self.rank :: self.size])

    def total(self, value: int) -> int:
        """The sum of the processes' numbers."""
        return value

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Let every tensor, of the same shapes in all processes, be the sum of the processes' ones, in place."""

    def told(self, value: T) -> T:
        """What rank 0 gives, in every process."""
        return value

    def wait(self) -> None:
        """Go on when all have come here."""


class ProcessGroup(World):
    """The default group of `torch.distributed`, which whoever starts the processes has initialised."""

    def __init__(self) -> None:
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def total(self, value: int) -> int:
        found = [0] * self.size
        torch.distributed.all_gather_object(found, value)
        return sum(found)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """One message for all tensors of a dtype; the same bits in every process."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for group in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            torch.distributed.all_reduce(flat)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def told(self, value: T) -> T:
        box = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        torch.distributed.barrier()


def current_world() -> World:
    """The processes that `torch.distributed` knows; without it this one."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return ProcessGroup() if there else World()
