"""One optimiser step: what it divides by, what it leaves alone, and what optimisers of other kinds may do in it."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from step_setting import MODEL, VOCABULARY, Setting, batches, corpus
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cvmk.config import OptimizerConfig
from cvmk.text.batching import Batch, collate
from cvmk.text.cache import TokenizedCorpus
from cvmk.text.corpus import CorpusReport
from cvmk.training import step as step_module
from cvmk.training.optimizers import Closure, Optimizer, build_optimizer
from cvmk.training.step import StepResult


class Sizes(TorchDispatchMode):
    """The largest tensor that an operation made."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        found = function(*arguments, **(options or {}))
        self.largest = max([self.largest, *(x.numel() for x in pytree.tree_leaves(found) if isinstance(x, Tensor))])
        return found


@pytest.mark.parametrize("teacher", [False, True])
def test_a_step_never_makes_the_logits(teacher: bool) -> None:
    vocabulary, rows = 20_000, 30
    setting = Setting(teacher=teacher, vocabulary=vocabulary)
    ids = torch.randint(4, vocabulary, (3, rows, 8))
    lengths = torch.full((rows,), 8)
    batch = Batch(*ids, lengths, lengths, torch.arange(rows), rows * 8)
    with Sizes() as sizes:
        setting.step([batch], 1.0)
    assert vocabulary * MODEL.d_model <= sizes.largest < vocabulary * rows * 8


@pytest.mark.parametrize("teacher", [False, True])
def test_accumulated_batches_are_one_batch(teacher: bool) -> None:
    """Losses divide by the tokens of all batches. Hidden states and attentions are weighted by the batches' target tokens, so here all lengths agree."""
    groups = [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11]]
    found = corpus()
    if teacher:
        ids = np.random.default_rng(2).integers(4, VOCABULARY, size=12 * 10).astype(np.uint16)
        found = TokenizedCorpus(np.arange(12), np.arange(25) * 5, ids, CorpusReport())
    one, many = Setting(teacher=teacher), Setting(teacher=teacher)
    whole = one.step([collate(found, [index for group in groups for index in group])], 1.0)
    parts = many.step([collate(found, group) for group in groups], 1.0)
    assert parts.tokens == whole.tokens == sum(len(found[index][1]) + 1 for index in range(12))
    assert parts.norm == pytest.approx(whole.norm, rel=1e-5)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6) and parts.loss == parts.values()["loss"]
    assert parts.values() == pytest.approx(whole.values(), rel=1e-5)
    assert set(parts.values()) == {"loss", "cross_entropy", "logits", "hidden", "attention"}
    for ours, theirs in zip(one.weights(), many.weights(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    setting = Setting()
    before = setting.weights()
    next(setting.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    result = setting.step(batches([[0, 1]]), 1.0)
    assert math.isnan(result.norm) and math.isfinite(result.loss)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(before, setting.weights(), strict=True))
    assert all(parameter.grad is None for parameter in setting.model.parameters())


def test_clipping_scales_the_gradient_to_the_norm() -> None:
    free, clipped = Setting(), Setting(clip_norm=0.01)
    start = free.weights()
    norm = free.step(batches([[0, 1]]), 1.0).norm
    assert clipped.step(batches([[0, 1]]), 1.0).norm == norm > 0.01  # the norm is that before clipping
    for before, ours, theirs in zip(start, free.weights(), clipped.weights(), strict=True):
        torch.testing.assert_close((ours - before) * (0.01 / norm), theirs - before, rtol=1e-3, atol=1e-7)


def test_values_are_read_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read waits for the device: loss and norm come in one, the parts only when somebody wants them."""
    reads: list[str] = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *arguments: Any, name: str = name, original: Any = original) -> Any:
            if sys._getframe(1).f_code.co_filename == step_module.__file__:
                reads.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(Tensor, name, counted)
    setting = Setting(clip_norm=1.0)
    made = batches([[0, 1], [2, 3]])
    reads.clear()
    result = setting.step(made, 1.0)
    assert reads == ["tolist"]
    result.values()
    assert reads == ["tolist"] * 2


# -- optimisers of other kinds ------------------------------------------------------------------------------------------------------
class Sharpness(Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021): the gradient at the weights that are worst nearby."""

    rho = 0.05

    def step(self, closure: Closure) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        moved = [(parameter, self.rho * parameter.grad / norm) for parameter in self.parameters if parameter.grad is not None]
        with torch.no_grad():
            for parameter, away in moved:
                parameter += away
        self.second_loss = closure()
        with torch.no_grad():
            for parameter, away in moved:
                parameter -= away
        self.inner.step()


def test_an_optimiser_may_look_twice() -> None:
    plain = Setting()
    setting = Setting(clip_norm=1.0)
    setting.driven_by(Sharpness(torch.optim.SGD(setting.model.parameters(), lr=0.5)))
    made = batches([[0, 1, 2], [3, 4]])
    start = setting.weights()
    result = setting.step(made, 1.0)
    assert isinstance(result, StepResult) and result.loss == pytest.approx(plain.step(made, 1.0).loss, rel=1e-6)
    assert float(setting.optimizer.second_loss) > result.loss, "nearby it is worse"
    # by hand: the gradient at the moved weights, clipped
    check = Setting()
    loss = sum(
        (check.objective(check.model(batch.src, batch.tgt_in), None, batch, normalizer=result.tokens).total for batch in made), start=torch.zeros(())
    )
    gradients = torch.autograd.grad(loss, list(check.model.parameters()))
    norm = torch.nn.utils.get_total_norm(gradients)
    scale = min(1.0, 1.0 / float(norm))
    with torch.no_grad():
        for parameter, gradient in zip(check.model.parameters(), gradients, strict=True):
            parameter += 0.05 * gradient * scale / (norm * scale)
    check.optimizer.zero_grad()
    for batch in made:
        check.objective(check.model(batch.src, batch.tgt_in), None, batch, normalizer=result.tokens).total.backward()
    torch.nn.utils.clip_grad_norm_(check.model.parameters(), 1.0)
    for before, after, parameter in zip(start, setting.weights(), check.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.5 * parameter.grad, rtol=1e-4, atol=1e-6)


def test_groups_keep_their_own_rates() -> None:
    """One factor for all: a group's rate is its own peak times it."""
    setting = Setting()
    first, *rest = setting.model.parameters()
    optimizer = Optimizer(torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.5))
    for factor in (0.5, 0.25, 1.0):
        optimizer.set_factor(factor)
        assert [group["lr"] for group in optimizer.inner.param_groups] == [0.1 * factor, 0.5 * factor]
    state = optimizer.state_dict()
    other = Optimizer(torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.5))
    other.load_state_dict(state)
    other.set_factor(0.1)
    assert [group["lr"] for group in other.inner.param_groups] == pytest.approx([0.01, 0.05])


def test_nothing_to_train() -> None:
    setting = Setting()
    for parameter in setting.model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(Exception, match="nothing to train"):
        build_optimizer(OptimizerConfig(), (setting.model, setting.objective))
