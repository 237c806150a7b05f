"""Batches that are prepared ahead: what a step gets, and where a checkpoint says that the next one begins."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cvmk.errors import ConfigError
from cvmk.text.batching import TokenBatchSampler
from cvmk.text.cache import TokenizedCorpus
from cvmk.text.corpus import CorpusReport
from cvmk.training.batches import Batches
from cvmk.training.world import World


def corpus(pairs: int = 23) -> TokenizedCorpus:
    random = np.random.default_rng(1)
    lengths = random.integers(1, 9, size=2 * pairs)
    return TokenizedCorpus(np.arange(pairs), np.concatenate([[0], np.cumsum(lengths)]), random.integers(4, 50, lengths.sum()).astype(np.uint16), CorpusReport())


def batches(accumulate: int = 2, max_tokens: int = 20) -> Batches:
    found = corpus()
    return Batches(found, TokenBatchSampler(found.lengths, max_tokens, 3), accumulate, torch.device("cpu"), World())


def taken(source: Batches, steps: int) -> list[list[int]]:
    return [[index for batch in next(source) for index in batch.indices.tolist()] for _ in range(steps)]


def drawn(steps: int, accumulate: int = 2) -> list[list[int]]:
    """What a sampler gives that nobody asks ahead."""
    sampler = TokenBatchSampler(corpus().lengths, 20, 3)
    return [[index for _ in range(accumulate) for index in next(sampler)] for _ in range(steps)]


def test_steps_are_the_samplers_and_any_checkpoint_goes_on_from_the_next_one() -> None:
    """Over the ends of epochs, too, where what is prepared ahead is of the next one."""
    expected, source = drawn(24), batches()
    for done in range(12):
        state = copy.deepcopy(source.state_dict())
        fresh = batches()
        fresh.load_state_dict(state)
        assert taken(fresh, 12) == expected[done : done + 12]
        assert taken(source, 1) == expected[done : done + 1]


def test_going_back_forgets_what_was_prepared() -> None:
    source, expected = batches(), drawn(8)
    start = source.state_dict()
    taken(source, 5)
    source.load_state_dict(start)
    assert taken(source, 8) == expected


def test_another_order_begins_the_epoch_of_the_next_step_anew() -> None:
    for steps in range(9):
        source = batches()
        taken(source, steps)
        epoch = source.state_dict()["epoch"]
        source.reorder(2)
        assert (source.state_dict()["epoch"], source.state_dict()["order"], source.state_dict()["position"]) == (epoch, 2, 0)
        sampler = TokenBatchSampler(corpus().lengths, 20, 3)
        sampler.epoch = epoch
        sampler.reseed(2)
        assert taken(source, 1) == [[index for _ in range(2) for index in next(sampler)]]


def taken_from(place: tuple[int, int]) -> list[list[int]]:
    source = batches()
    while (source.state_dict()["epoch"], source.state_dict()["position"]) != place:
        next(source)
    return taken(source, 2)


def test_what_goes_wrong_ahead_is_raised_by_the_step_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    source = batches()
    taken(source, 1)
    with monkeypatch.context() as patched:
        patched.setattr("cvmk.training.batches.collate", lambda *a: (_ for _ in ()).throw(OSError("the disk is gone")))
        with pytest.raises(OSError, match="the disk is gone"):
            for _ in range(3):
                state = source.state_dict()
                next(source)
    steps = state["epoch"], state["position"]
    assert source.state_dict() == state and taken(source, 2) == taken_from(steps)


def test_a_checkpoint_of_other_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        batches().load_state_dict(batches(max_tokens=30).state_dict())
