"""The batches of each step, and how far the corpus has been read."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from cvmk.text.batching import Batch, TokenBatchSampler, collate
from cvmk.text.cache import TokenizedCorpus
from cvmk.training.world import World

_Prepared = tuple[list[Batch], dict[str, Any]]


class Place(NamedTuple):
    """Where a step's batches lie in the corpus: the epoch (from 0) of the first, and whether they begin it and end it."""

    epoch: int
    begins: bool
    ends: bool


class Batches:
    """Endless iterator over the steps: each gives this process's batches, on the device.

    `accumulate` batches a process and a step. While a step is computed a thread prepares the next one's; `state_dict` says where the next
    step begins that nobody has taken yet.
    """

    def __init__(self, corpus: TokenizedCorpus, sampler: TokenBatchSampler, accumulate: int, device: torch.device, world: World) -> None:
        self._corpus, self._sampler, self._accumulate, self._device, self._world = corpus, sampler, accumulate, device, world
        self._state = sampler.state_dict()
        self.place = Place(self._state["epoch"], False, False)
        """Of the batches that were taken last."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="cvmk-batches")
        self._ahead: Future[_Prepared] | None = None

    def __next__(self) -> list[Batch]:
        ahead, self._ahead = self._ahead, None
        before = self._state
        try:
            batches, self._state = self._prepare() if ahead is None else ahead.result()
        except BaseException:
            self._sampler.load_state_dict(self._state)
            raise
        self.place = Place(before["epoch"], before["position"] == 0, self._state["epoch"] != before["epoch"])
        self._ahead = self._worker.submit(self._prepare)
        return batches

    def _prepare(self) -> _Prepared:
        """The batches of the sampler's next step, and its state behind them."""
        drawn = [next(self._sampler) for _ in range(self._accumulate * self._world.size)]
        return [collate(self._corpus, indices).to(self._device) for indices in self._world.share(drawn)], self._sampler.state_dict()

    def _take_back(self) -> None:
        """Let the sampler stand where the next step begins."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.exception()  # waits for it; what went wrong goes wrong again when it is wanted
            self._sampler.load_state_dict(self._state)

    def reorder(self, number: int) -> None:
        """Take order number `number` of the data from here on, as after a rollback."""
        self._take_back()
        self._sampler.reseed(number)
        self._state = self._sampler.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError where the data or the batch size is another."""
        self._take_back()
        self._sampler.load_state_dict(state)
        self._state = self._sampler.state_dict()
