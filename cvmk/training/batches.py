"""The batches of each step, and how far the corpus has been read."""

from __future__ import annotations

from typing import Any

import torch

from cvmk.text.batching import Batch, TokenBatchSampler, collate
from cvmk.text.cache import TokenizedCorpus
from cvmk.training.world import World


class Batches:
    """Endless iterator over the steps: each gives this process's batches, on the device.

    `accumulate` batches a process and a step; `state_dict` says where the next step begins.
    """

    def __init__(self, corpus: TokenizedCorpus, sampler: TokenBatchSampler, accumulate: int, device: torch.device, world: World) -> None:
        self._corpus, self._sampler, self._accumulate, self._device, self._world = corpus, sampler, accumulate, device, world

    def __next__(self) -> list[Batch]:
        drawn = [next(self._sampler) for _ in range(self._accumulate * self._world.size)]
        return [collate(self._corpus, indices).to(self._device) for indices in self._world.share(drawn)]

    def reorder(self, number: int) -> None:
        """Take order number `number` of the data from here on, as after a rollback."""
        self._sampler.reseed(number)

    def state_dict(self) -> dict[str, Any]:
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError where the data or the batch size is another."""
        self._sampler.load_state_dict(state)
