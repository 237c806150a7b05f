"""Batches of similar length within a token budget, in an order that a checkpoint can continue exactly."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cvmk.errors import ConfigError
from cvmk.text.cache import TokenizedCorpus
from cvmk.text.tokenizers import Tokenizer

LENGTH_NOISE = 2.0  # tokens; mixes neighbouring lengths so that batches differ between epochs


@dataclass
class Batch:
    """Padded pairs; all tensors int64.

    `src` [B, S] ends each row with EOS; `tgt_in` [B, T] begins with BOS; `tgt_out` [B, T] ends with EOS; PAD fills the
    right. `src_lengths` and `tgt_lengths` [B] count the tokens that are not PAD; `indices` [B] are the rows of the corpus.
    `tokens` is the number of target tokens that are not PAD.
    """

    src: torch.Tensor
    tgt_in: torch.Tensor
    tgt_out: torch.Tensor
    src_lengths: torch.Tensor
    tgt_lengths: torch.Tensor
    indices: torch.Tensor
    tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; itself where it is there already."""
        if self.src.device == torch.device(device):
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(move(self.src), move(self.tgt_in), move(self.tgt_out), move(self.src_lengths), move(self.tgt_lengths), move(self.indices), self.tokens)


def collate(corpus: TokenizedCorpus, indices: Sequence[int]) -> Batch:
    """The pairs `indices` of `corpus` as one batch."""
    rows: np.ndarray = np.asarray(indices, np.int64).reshape(-1)
    src_lengths, tgt_lengths = (corpus.lengths[rows, side].astype(np.int64) + 1 for side in (0, 1))
    source_width, target_width = int(src_lengths.max(initial=1)), int(tgt_lengths.max(initial=1))
    src = corpus.padded(rows, 0, 0, source_width, Tokenizer.PAD)
    tgt_in = corpus.padded(rows, 1, 1, target_width, Tokenizer.PAD)
    tgt_out = corpus.padded(rows, 1, 0, target_width, Tokenizer.PAD)
    every = np.arange(len(rows))
    src[every, src_lengths - 1] = tgt_out[every, tgt_lengths - 1] = Tokenizer.EOS
    tgt_in[:, 0] = Tokenizer.BOS
    tensor = torch.from_numpy
    return Batch(
        tensor(src), tensor(tgt_in), tensor(tgt_out), tensor(src_lengths), tensor(tgt_lengths), tensor(rows.copy()), int(tgt_lengths.sum())
    )


class TokenBatchSampler:
    """Endless iterator of index lists, epoch after epoch; each epoch has every pair once.

    `lengths` [n, 2] counts the ids of each pair's sides without special ones, as `TokenizedCorpus.lengths` does. A
    batch costs its size times its longest side (BOS or EOS included), which never exceeds `max_tokens`. An epoch's
    order is a function of (seed, order, epoch, world) alone, so `state_dict` is a few integers; `order` counts the calls
    for a new order.

    Of `world` processes the one of number `rank` gets every `world`-th batch: together they have every pair once, each has
    as many batches as the others (some batches are halved where the number does not come out even; where even that is
    too few because all have one pair, some processes get an empty one), and the state is the same in all of them.
    """

    def __init__(self, lengths: np.ndarray, max_tokens: int, seed: int = 0, *, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is none of a world of {world}: ranks are 0 to world - 1")
        self._sizes = np.asarray(lengths).reshape(-1, 2).astype(np.int64) + 1
        self.max_tokens = max_tokens
        self.seed = seed
        self.rank, self.world = rank, world
        self.order = 0
        self.epoch = 0
        self.position = 0
        if not len(self._sizes):
            raise ConfigError("there is no training pair to make batches of: check data.train")
        if len(self._sizes) < world:
            raise ConfigError(f"{len(self._sizes)} training pairs are too few for {world} processes: start fewer, or give more text in data.train")
        longest = int(self._sizes.max())
        if longest > max_tokens:
            raise ConfigError(
                f"training.max_tokens = {max_tokens} is smaller than the longest training pair ({longest} tokens): "
                f"set it to at least {longest}, or lower data.max_tokens_per_sentence"
            )
        self._batches: list[list[int]] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        if self._batches is None:
            self._batches = self._epoch_batches()
        batch = list(self._batches[self.position * self.world + self.rank])
        self.position += 1
        if self.position * self.world == len(self._batches):
            self.epoch += 1
            self.position = 0
            self._batches = None
        return batch

    def batches_per_epoch(self) -> int:
        """Batches that each process has of the current epoch; other epochs differ by a few."""
        if self._batches is None:
            self._batches = self._epoch_batches()
        return len(self._batches) // self.world

    def reseed(self, n: int) -> None:
        """Take order number `n` (any whole number >= 0) and begin the current epoch anew, as after a rollback."""
        self.order = n
        self.position = 0
        self._batches = None

    def state_dict(self) -> dict[str, int]:
        names = ("seed", "order", "epoch", "position", "max_tokens", "world")
        return {name: int(getattr(self, name)) for name in names} | {"pairs": len(self._sizes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken, in whatever process. Raises ConfigError where data, batch size or number of processes are others."""
        state = {"world": 1, **state}  # a state of an older cvmk has no world
        own = {"training pairs": ("pairs", len(self._sizes)), "training.max_tokens": ("max_tokens", self.max_tokens), "processes": ("world", self.world)}
        for what, (key, value) in own.items():
            if (saved := state[key]) != value:
                raise ConfigError(f"the checkpoint was made with {what} = {saved} and this run has {value}: resume with the same, or start a new run")
        self.seed, self.order, self.epoch, self.position = (int(state[name]) for name in ("seed", "order", "epoch", "position"))
        self._batches = None

    def _epoch_batches(self) -> list[list[int]]:
        random = np.random.default_rng([self.seed, self.order, self.epoch])
        longest = self._sizes.max(axis=1)
        noisy = longest + random.random(len(longest)) * LENGTH_NOISE
        order = np.lexsort((random.random(len(longest)), self._sizes[:, 0], np.floor(noisy)))
        batches: list[list[int]] = []
        start = 0
        width = 0
        widths = longest[order].tolist()
        for position, size in enumerate(widths):
            grown = max(width, size)
            if grown * (position - start + 1) > self.max_tokens:
                batches.append(order[start:position].tolist())
                start = position
                grown = size
            width = grown
        batches.append(order[start:].tolist())
        _even_out(batches, self.world)
        return [batches[index] for index in random.permutation(len(batches))]


def _even_out(batches: list[list[int]], world: int) -> None:
    """Halve the largest batches until their number is a multiple of `world`."""
    missing = -len(batches) % world
    largest = [(-len(batch), index) for index, batch in enumerate(batches)] if missing else []
    heapq.heapify(largest)
    for _ in range(missing):
        _, index = heapq.heappop(largest)
        batch = batches[index]
        batches[index], rest = batch[: (len(batch) + 1) // 2], batch[(len(batch) + 1) // 2 :]
        heapq.heappush(largest, (-len(batches[index]), index))
        heapq.heappush(largest, (-len(rest), len(batches)))
        batches.append(rest)
