"""Batches: contents, budget, coverage, order, exact continuation."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cvmk.errors import ConfigError
from cvmk.text.batching import TokenBatchSampler, collate
from cvmk.text.cache import tokenized
from cvmk.text.corpus import CorpusReport, ParallelCorpus
from cvmk.text.tokenizers.fallback import FallbackTokenizer

BYTES = FallbackTokenizer([])  # one id a byte: "a" is 101, and every text starts with the space 36


def lengths(count: int, longest: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, longest, (count, 2)).astype(np.int32)


def epoch(sampler: TokenBatchSampler) -> list[list[int]]:
    return [next(sampler) for _ in range(sampler.batches_per_epoch())]


def test_collate(tmp_path: Path) -> None:
    corpus = tokenized(ParallelCorpus(["a", "ab", "b"], ["cd", "c", "abcd"], "x", CorpusReport()), BYTES, tmp_path, 9)
    batch = collate(corpus, [2, 0])
    assert batch.src.tolist() == [[36, 102, 3], [36, 101, 3]]
    assert batch.tgt_in.tolist() == [[2, 36, 101, 102, 103, 104], [2, 36, 103, 104, 0, 0]]
    assert batch.tgt_out.tolist() == [[36, 101, 102, 103, 104, 3], [36, 103, 104, 3, 0, 0]]
    assert batch.src_lengths.tolist() == [3, 3] and batch.tgt_lengths.tolist() == [6, 4]
    assert batch.indices.tolist() == [2, 0] and batch.tokens == 10
    assert all(value.dtype == torch.int64 for value in vars(batch).values() if isinstance(value, torch.Tensor))
    assert collate(corpus, [0, 1]).src.tolist() == [[36, 101, 3, 0], [36, 101, 102, 3]]


def test_move(tmp_path: Path) -> None:
    corpus = tokenized(ParallelCorpus(["a"], ["b"], "x", CorpusReport()), BYTES, tmp_path, 9)
    batch = collate(corpus, [0])
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    assert all(value.device.type == "meta" for value in vars(moved).values() if isinstance(value, torch.Tensor)) and moved.tokens == 3


@pytest.mark.parametrize(("count", "budget"), [(1, 100), (7, 64), (2000, 60), (2000, 512), (2000, 10**9)])
def test_every_pair_once_within_the_budget(count: int, budget: int) -> None:
    sizes = lengths(count)
    sampler = TokenBatchSampler(sizes, budget, seed=3)
    for _ in range(3):
        batches = epoch(sampler)
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        for batch in batches:
            assert batch and (sizes[batch].max() + 1) * len(batch) <= budget


def test_batches_are_full_of_tokens() -> None:
    sizes = np.repeat(np.random.default_rng(1).integers(1, 60, (5000, 1)), 2, axis=1)
    sampler = TokenBatchSampler(sizes, 2048, seed=0)
    batches = epoch(sampler)
    padded = sum((sizes[batch].max() + 1) * len(batch) for batch in batches)
    assert (sizes[:, 0] + 1).sum() / padded > 0.93
    assert padded / len(batches) > 0.9 * 2048


def test_orders_differ_between_epochs_and_seeds_but_repeat() -> None:
    sizes = lengths(500)
    first, same, other = (TokenBatchSampler(sizes, 400, seed) for seed in (1, 1, 2))
    one, two = epoch(first), epoch(first)
    assert one == epoch(same) and two == epoch(same)
    assert one != two and one != epoch(other)
    assert {tuple(sorted(batch)) for batch in one} != {tuple(sorted(batch)) for batch in two}, "the batches themselves change too"
    widths = [int(sizes[batch].max()) for batch in one]
    assert widths != sorted(widths), "batches are not ordered by length"


@pytest.mark.parametrize("steps", [0, 1, 13, 39, 40, 41, 200])
def test_exact_continuation(steps: int) -> None:
    sizes = lengths(400)
    straight = TokenBatchSampler(sizes, 400, seed=5)
    for _ in range(steps):
        next(straight)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = TokenBatchSampler(sizes, 400, seed=99)
    next(resumed)
    resumed.load_state_dict(state)
    for _ in range(100):
        assert next(resumed) == next(straight)
    assert resumed.state_dict() == straight.state_dict()


def test_end_of_epoch_state() -> None:
    straight = TokenBatchSampler(lengths(50), 400, seed=5)
    epoch(straight)
    resumed = TokenBatchSampler(lengths(50), 400, seed=5)
    resumed.load_state_dict(straight.state_dict())
    assert epoch(resumed) == epoch(straight)


def test_new_order_after_a_rollback() -> None:
    sizes = lengths(400)
    sampler = TokenBatchSampler(sizes, 400, seed=5)
    old = epoch(sampler)
    state = sampler.state_dict()
    sampler.load_state_dict(state)
    sampler.reseed(1)
    new = epoch(sampler)
    assert new != old and sorted(sum(new, [])) == list(range(400))
    sampler.reseed(2)
    third = epoch(sampler)
    assert third != new
    resumed = TokenBatchSampler(sizes, 400, seed=5)
    resumed.load_state_dict(sampler.state_dict())
    assert next(resumed) == next(sampler)
    sampler.reseed(1)
    assert epoch(sampler) != old


def test_returned_lists_are_the_callers() -> None:
    sampler, same = TokenBatchSampler(lengths(20), 10**6, 1), TokenBatchSampler(lengths(20), 10**6, 1)
    next(sampler).clear()
    next(same)
    sampler.load_state_dict(sampler.state_dict())
    assert next(sampler) == next(same)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"training\.max_tokens = 50 is smaller than the longest training pair \(60 tokens\)"):
        TokenBatchSampler(np.array([[3, 59], [1, 1]]), 50, 0)
    TokenBatchSampler(np.array([[3, 59]]), 60, 0)
    with pytest.raises(ConfigError, match="no training pair"):
        TokenBatchSampler(np.zeros((0, 2), np.int32), 50, 0)
    state = TokenBatchSampler(lengths(10), 400, 0).state_dict()
    with pytest.raises(ConfigError, match="training pairs = 10 and this run has 11"):
        TokenBatchSampler(lengths(11), 400, 0).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"training\.max_tokens = 400 and this run has 401"):
        TokenBatchSampler(lengths(10), 401, 0).load_state_dict(state)


def test_an_epoch_of_multi30k_size_is_fast() -> None:
    sizes = lengths(29_000)
    start = time.perf_counter()
    TokenBatchSampler(sizes, 4096, 0).batches_per_epoch()
    assert time.perf_counter() - start < 1.0


# -- several processes ---------------------------------------------------------------------------------------------------------------
def world_of(size: int, sizes: np.ndarray, budget: int = 512, seed: int = 3) -> list[TokenBatchSampler]:
    return [TokenBatchSampler(sizes, budget, seed, rank=rank, world=size) for rank in range(size)]


def test_one_process_has_the_batches_that_it_always_had() -> None:
    sampler = TokenBatchSampler(lengths(2000), 512, seed=3, rank=0, world=1)
    drawn = json.dumps([next(sampler) for _ in range(700)])
    assert hashlib.sha256(drawn.encode()).hexdigest() == "229205cb88a9d4f9de9f52fd22a4a0e03d91574029230bdf627e179fb9c5c9b9"
    assert sampler.state_dict() == {"seed": 3, "order": 0, "epoch": 4, "position": 8, "max_tokens": 512, "pairs": 2000, "world": 1}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize(("count", "budget"), [(8, 64), (8, 10**9), (9, 60), (2000, 60), (2000, 512), (2000, 10**9)])
def test_processes_share_the_pairs(size: int, count: int, budget: int) -> None:
    sizes = lengths(count)
    samplers = world_of(size, sizes, budget)
    for _ in range(3):
        shares = [epoch(sampler) for sampler in samplers]
        assert len({len(share) for share in shares}) == 1, "each takes as many steps as the others"
        assert sorted(index for share in shares for batch in share for index in batch) == list(range(count))
        for batch in (batch for share in shares for batch in share):
            assert (sizes[batch].max(initial=0) + 1) * len(batch) <= budget
            assert batch or count < size * len(shares[0]), "a process has nothing to do only where there are fewer pairs than turns"
        assert len({json.dumps(sampler.state_dict()) for sampler in samplers}) == 1


@pytest.mark.parametrize("steps", [0, 1, 17, 120])
def test_a_world_continues_from_the_state_of_any_of_its_processes(steps: int) -> None:
    sizes = lengths(400)
    straight = world_of(3, sizes)
    for sampler in straight:
        for _ in range(steps):
            next(sampler)
    state = json.loads(json.dumps(straight[1].state_dict()))
    resumed = world_of(3, sizes, seed=9)
    for one, other in zip(straight, resumed, strict=True):
        other.load_state_dict(state)
        assert [next(one) for _ in range(60)] == [next(other) for _ in range(60)]
        one.reseed(2)
        other.reseed(2)
        assert epoch(one) == epoch(other)


def test_a_state_from_before_is_of_one_process() -> None:
    sizes = lengths(400)
    sampler = TokenBatchSampler(sizes, 512, 3)
    for _ in range(5):
        next(sampler)
    state = sampler.state_dict()
    del state["world"]
    resumed = TokenBatchSampler(sizes, 512, 8)
    resumed.load_state_dict(state)
    assert next(resumed) == next(sampler)
    with pytest.raises(ConfigError, match="made with processes = 1 and this run has 2"):
        world_of(2, sizes)[0].load_state_dict(state)
    with pytest.raises(ConfigError, match="made with processes = 2 and this run has 1"):
        sampler.load_state_dict(world_of(2, sizes)[1].state_dict())


def test_impossible_worlds() -> None:
    for rank, world in ((1, 1), (-1, 2), (2, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank"):
            TokenBatchSampler(lengths(9), 512, rank=rank, world=world)
    with pytest.raises(ConfigError, match="9 training pairs are too few for 10 processes"):
        TokenBatchSampler(lengths(9), 512, rank=0, world=10)
