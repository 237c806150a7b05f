"""From the configuration to an optimiser, and runs with optimisers of other kinds through the same seams."""

from __future__ import annotations

import copy
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import last_step, train

from cvmk.config import DistillationConfig, ModelConfig, OptimizerConfig
from cvmk.config.optimizer import OPTIMIZERS, Base
from cvmk.distill import DistillationObjective
from cvmk.files import followed
from cvmk.nn import CVMTransformer
from cvmk.training.optimizers import Optimizer, build, build_optimizer
from cvmk.training.optimizers.build import BUILDERS, Groups, Rows, parameter_groups
from cvmk.training.optimizers.flat_adamw import FlatAdamW
from cvmk.training.trainer import Trainer

MODEL = ModelConfig(d_model=16, ffn=32, heads=2, encoder_layers=1, decoder_layers=1, max_length=32)


def modules(tied: bool = True) -> tuple[CVMTransformer, DistillationObjective]:
    torch.manual_seed(1)
    student = MODEL.model_copy(update={"tie_embeddings": tied})
    teacher = MODEL.model_copy(update={"d_model": 24})
    return CVMTransformer(student, 40, 0), DistillationObjective(
        DistillationConfig(beta=1.0), label_smoothing=0.0, student=student, teacher=teacher, vocab_size=40
    )


def test_every_name_of_the_schema_is_built() -> None:
    names, bases = (typing.get_args(annotation) for annotation in (OptimizerConfig.model_fields["name"].annotation, Base))
    assert set(names) == {*OPTIMIZERS.options} and set(bases) == {*BUILDERS} == {*names} - {"sam", "asam"}
    for name in names:
        optimizer = build_optimizer(OptimizerConfig(name=name), modules())
        assert isinstance(optimizer, Optimizer) and optimizer.parameters


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_each_parameter_is_there_once(tied: bool) -> None:
    model, objective = modules(tied)
    decayed, plain = parameter_groups(OptimizerConfig(weight_decay=0.3), (model, objective))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for module in (model, objective) for name, parameter in module.named_parameters()}
    assert sorted(map(id, [*decayed["params"], *plain["params"]])) == sorted(names)
    for group, wanted in ((decayed, True), (plain, False)):
        for parameter in group["params"]:
            name = names[id(parameter)]
            is_matrix = parameter.ndim == 2 and "embeddings" not in name and not name.startswith("projections")
            assert is_matrix is wanted, name


def test_frozen_parameters_are_left_out() -> None:
    model, objective = modules()
    model.encoder.requires_grad_(False)
    optimizer = build_optimizer(OptimizerConfig(), (model, objective))
    assert not {id(parameter) for parameter in model.encoder.parameters()} & {id(parameter) for parameter in optimizer.parameters}


def test_rates_and_a_step() -> None:
    model, objective = modules()
    optimizer = build_optimizer(OptimizerConfig(learning_rate=0.5, betas=(0.8, 0.9), eps=1e-3), (model, objective))
    optimizer.set_factor(0.25)
    assert all(group["lr"] == 0.125 and group["betas"] == (0.8, 0.9) and group["eps"] == 1e-3 for group in optimizer.inner.param_groups)
    before = [parameter.detach().clone() for parameter in optimizer.parameters]
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    norm = optimizer.clip(0.0)
    assert float(norm) == pytest.approx(sum(parameter.numel() for parameter in optimizer.parameters) ** 0.5)
    optimizer.step(lambda: pytest.fail("AdamW looks once"))
    assert all((now != then).any() for now, then in zip(optimizer.parameters, before, strict=True))
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in optimizer.parameters)


def both(dtype: torch.dtype = torch.float64) -> tuple[list[torch.nn.Parameter], FlatAdamW, list[torch.nn.Parameter], Optimizer]:
    """The same parameters, some of odd sizes, under AdamW over flat memory and under PyTorch's."""
    sides: list[Any] = []
    for kind in (FlatAdamW, Optimizer):
        torch.manual_seed(2)
        shapes = [(3, 5), (7,), (300, 257), (), (0, 4), (70, 1000)]  # two of them are large
        parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
        groups = [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "weight_decay": 0.0}]
        sides += [parameters, kind(torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.98), eps=1e-9))]
    return tuple(sides)  # type: ignore[return-value]


def advance(parameters: list[torch.nn.Parameter], optimizer: Optimizer, step: int, *, norm: float = 1.0, without: Sequence[int] = ()) -> float:
    generator = torch.Generator().manual_seed(step)
    for i, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape[::-1], generator=generator, dtype=parameter.dtype).permute(list(reversed(range(parameter.dim()))))  # with gaps
        parameter.grad = None if i in without else gradient
    optimizer.set_factor(1 / step)
    found = float(optimizer.clip(norm))
    optimizer.step(lambda: pytest.fail("AdamW looks once"))
    optimizer.zero_grad()
    return found


def test_steps_over_flat_memory_are_those_of_pytorch_and_so_are_checkpoints() -> None:
    """Parameters that get no gradient are left alone, and keep their own count of steps; either side goes on from the other's checkpoint."""
    ours, flat, theirs, plain = both()
    for step, norm, without in ((1, 1.0, ()), (2, 0.0, (1,)), (3, 1e6, (0, 5)), (4, 0.5, range(6)), (5, 1.0, ())):
        norms = [advance(parameters, optimizer, step, norm=norm, without=without) for parameters, optimizer in ((ours, flat), (theirs, plain))]
        assert norms[0] == pytest.approx(norms[1], rel=1e-12)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    saved, expected = flat.state_dict(), plain.state_dict()
    assert saved["param_groups"] == expected["param_groups"] and saved["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        torch.testing.assert_close(saved["state"][index], state, rtol=1e-12, atol=1e-13)
    saved = copy.deepcopy(saved)
    flat.load_state_dict(copy.deepcopy(expected))
    plain.load_state_dict(saved)
    advance(ours, flat, 6), advance(theirs, plain, 6)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_a_checkpoint_from_before_the_first_step_is_that_of_a_fresh_optimiser() -> None:
    ours, flat, *_ = both()
    fresh = copy.deepcopy(flat.state_dict())
    weights = [parameter.detach().clone() for parameter in ours]
    advance(ours, flat, 1), advance(ours, flat, 2)
    once = [parameter.detach().clone() for parameter in ours]
    flat.load_state_dict(fresh)
    with torch.no_grad():
        for parameter, weight in zip(ours, weights, strict=True):
            parameter.copy_(weight)
    advance(ours, flat, 1), advance(ours, flat, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, once, strict=True))


def test_weights_that_were_cast_or_replaced_are_laid_out_anew() -> None:
    ours, flat, theirs, plain = both(torch.float32)
    advance(ours, flat, 1), advance(theirs, plain, 1)
    for parameter in ours + theirs:
        parameter.data = parameter.data.double()
    plain.load_state_dict(plain.state_dict())  # casts the moments
    advance(ours, flat, 2), advance(theirs, plain, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours[0].data = ours[0].data.bfloat16()
    with pytest.raises(RuntimeError, match="build the optimiser after moving or casting"):
        advance(ours, flat, 3)


def test_whoever_packed_a_weight_is_told_that_it_changed_and_copies_are_apart() -> None:
    ours, flat, *_ = both(torch.float32)
    advance(ours, flat, 1)
    versions, twin, before = [parameter._version for parameter in ours], copy.deepcopy(ours[0]), ours[0].detach().clone()
    advance(ours, flat, 2, without=(1,))
    assert [now > then for now, then in zip([parameter._version for parameter in ours], versions, strict=True)] == [True, False, True, True, True, True]
    assert torch.equal(twin, before) and not torch.equal(ours[0], before)
    assert twin.untyped_storage().nbytes() == twin.numel() * 4


def test_flat_steps_have_the_same_bits_for_any_number_of_threads() -> None:
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 300_000).view(shape)) for shape in ((300_000,), (60_000, 5), (5, 60_000))]
            optimizer = FlatAdamW(torch.optim.AdamW(parameters, lr=0.1))
            norm = advance(parameters, optimizer, 1, norm=0.3)
            found.append((norm, torch.cat([parameter.detach().flatten() for parameter in parameters])))
    finally:
        torch.set_num_threads(before)
    assert all(norm == found[0][0] and torch.equal(weights, found[0][1]) for norm, weights in found)


# -- whole runs ----------------------------------------------------------------------------------------------------------------------
class ScheduleFree(Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): gradients at y, an average x to be used; the model holds one or the other."""

    beta = 0.9

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner)
        self.z = [parameter.detach().clone() for parameter in self.parameters]
        self.count, self.trains = 0, False
        self.switches: list[str] = []

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    def _switch(self, trains: bool) -> None:
        if self.trains != trains:
            self.trains = trains
            self.switches.append("train" if trains else "eval")
            for parameter, z in zip(self.parameters, self.z, strict=True):  # y = beta x + (1 - beta) z
                parameter.data.lerp_(z, 1 - self.beta if trains else 1 - 1 / self.beta)

    def step(self, closure: Any) -> None:
        assert self.trains
        self.count += 1
        rate = self.inner.param_groups[0]["lr"]
        with torch.no_grad():
            for parameter, z in zip(self.parameters, self.z, strict=True):
                parameter.lerp_(z, 1 / self.count)
                parameter.sub_(parameter.grad, alpha=rate * (1 - self.beta * (1 - 1 / self.count)))
                z.sub_(parameter.grad, alpha=rate)

    def state_dict(self) -> dict[str, Any]:
        assert not self.trains, "a checkpoint holds the weights to be used"
        return {"z": self.z, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self.z, state["z"], strict=True):
            mine.copy_(saved)
        self.count, self.trains = state["count"], False


class Twice(Optimizer):
    """Steps with the gradient at weights that are a little further on."""

    def step(self, closure: Any) -> None:
        start = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            for parameter in self.parameters:
                parameter += 0.01 * parameter.grad
        closure()
        with torch.no_grad():
            for parameter, before in zip(self.parameters, start, strict=True):
                parameter.copy_(before)
        self.inner.step()


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("kind", [ScheduleFree, Twice])
def test_resume_is_bit_for_bit_with_any_optimiser(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Optimizer]) -> None:
    made: list[Optimizer] = []

    def builder(config: OptimizerConfig, groups: Groups, rows: Rows) -> Optimizer:
        made.append(kind(torch.optim.SGD([{**groups[0], "lr": 0.1}, groups[1]], lr=0.2)))
        return made[-1]

    monkeypatch.setitem(build.BUILDERS, "adamw", builder)
    options = ["training.iterations=30", "validation.validate_every=15", "validation.max_sentences=4", "model.attention_dropout=0.1"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    report = train(config, *options, f"run.folder={straight}")
    assert report["losses"]["last"]["loss"] < report["losses"]["first"]

    def strike(trainer: Trainer) -> None:
        if trainer.progress.step == 24:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        train(config, *options, f"run.folder={killed}", on_step=strike, monkeypatch=patch)
    assert last_step(killed) == 20
    train(config, *options, f"run.folder={killed}", resume=True)
    for name in ("model.safetensors", "state.pt"):
        one, other = (followed(folder / "checkpoints" / "last") / name for folder in (straight, killed))
        assert one.read_bytes() == other.read_bytes(), name
    if isinstance(made[0], ScheduleFree):
        assert made[0].switches[:4] == ["train", "eval", "train", "eval"], "at every save and validation, and at no other time"
        assert len(made[0].switches) == 2 * 4  # saves at 10, 20, 30 and validations at 15, 30
