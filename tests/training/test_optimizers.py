"""From the configuration to an optimiser, and runs with optimisers of other kinds through the same seams."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import last_step, train

from cvmk.config import DistillationConfig, ModelConfig, OptimizerConfig
from cvmk.distill import DistillationObjective
from cvmk.files import followed
from cvmk.nn import CVMTransformer
from cvmk.training.optimizers import Optimizer, build, build_optimizer
from cvmk.training.optimizers.build import BUILDERS, Groups, parameter_groups
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
    names = typing.get_args(OptimizerConfig.model_fields["name"].annotation)
    assert set(names) == set(BUILDERS)
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

    def builder(config: OptimizerConfig, groups: Groups) -> Optimizer:
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
