"""Every optimiser that a configuration names: its steps by its paper's formula, and runs that stop and go on as if they had not."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import events, train
from step_setting import Setting, batches
from torch import Tensor

from cvmk import nvtx
from cvmk.cli import main
from cvmk.config import ModelConfig, OptimizerConfig
from cvmk.config import optimizer as optimizer_config
from cvmk.errors import ConfigError
from cvmk.files import followed
from cvmk.nn import MIXERS, CVMTransformer, Linear, decays, projection_rows
from cvmk.training import pipeline
from cvmk.training.optimizers import Optimizer, build_optimizer
from cvmk.training.optimizers.joined import Joined
from cvmk.training.optimizers.muon import Muon
from cvmk.training.optimizers.schedule_free import ScheduleFree
from cvmk.training.optimizers.sharpness import SharpnessAware
from cvmk.training.trainer import Trainer

NAMES = ["adamw", "lion", "adafactor", "muon", "schedule_free_adamw", "sam", "asam"]
OVER = [("sam", base) for base in ("lion", "adafactor", "muon", "schedule_free_adamw")]


class Layer(torch.nn.Module):
    """Two projections in one matrix, a bias, and a table."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.linear = Linear(6, [4, 8])
        self.table = torch.nn.Parameter(torch.randn(9, 6))
        self.linear.bias.data.normal_()
        self.to(dtype)

    def loss(self) -> Tensor:
        return self.linear(self.table.sin()).square().sum() + self.table.cos().sum()


def advance(layer: Layer, optimizer: Optimizer, *, factor: float = 1.0, norm: float = 0.0) -> float:
    """One step as the training step drives it."""
    optimizer.train()
    optimizer.set_factor(factor)
    layer.loss().backward()

    def again() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = layer.loss()
            loss.backward()
        optimizer.clip(norm)
        return loss

    found = float(optimizer.clip(norm))
    optimizer.step(again)
    optimizer.zero_grad()
    return found


def gradients(layer: Layer) -> dict[str, Tensor]:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(layer.loss(), parameters), strict=True))


def weights(layer: Layer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}


def decay_of(name: str, decay: float) -> float:
    return decay if name == "linear.weight" else 0.0


# -- each by its formula -------------------------------------------------------------------------------------------------------------
def test_lion() -> None:
    layer, optimizer = (made := Layer()), build_optimizer(OptimizerConfig(name="lion", learning_rate=0.1, betas=(0.8, 0.95), weight_decay=0.2), [made])
    w, momentum = weights(layer), dict.fromkeys(weights(layer), 0.0)
    for factor in (1.0, 0.5, 0.25):
        for name, gradient in gradients(layer).items():
            step = torch.sign(0.8 * momentum[name] + 0.2 * gradient) + decay_of(name, 0.2) * w[name]
            w[name], momentum[name] = w[name] - 0.1 * factor * step, 0.95 * momentum[name] + 0.05 * gradient
        advance(layer, optimizer, factor=factor)
        torch.testing.assert_close(weights(layer), w)


@pytest.mark.parametrize("scaled", [False, True])
def test_adafactor(scaled: bool) -> None:
    config = OptimizerConfig(name="adafactor", learning_rate=0.1, weight_decay=0.2, clip_threshold=0.7, scale_parameter=scaled, momentum_dtype="float32")
    layer = Layer(torch.float32)
    optimizer = build_optimizer(config, [layer])
    w, state = weights(layer), {name: [0.0] * 3 for name in weights(layer)}
    for step in (1, 2, 3):
        beta = min(0.999, 1 - step**-0.8)
        for name, gradient in gradients(layer).items():
            momentum, rows, columns = state[name]
            rate = 0.1 * (max(1e-3, float(w[name].square().mean().sqrt())) if scaled else 1.0)
            square = gradient.square() + 1e-30
            if gradient.dim() == 2:
                rows, columns = (beta * old + (1 - beta) * square.mean(dim) for old, dim in ((rows, 1), (columns, 0)))
                second = torch.outer(rows, columns) / rows.mean()
            else:
                second = rows = beta * rows + (1 - beta) * square
            update = gradient / second.sqrt()
            update = update / max(1.0, float(update.square().mean().sqrt()) / 0.7)
            momentum = 0.9 * momentum + 0.1 * rate * update
            w[name], state[name] = w[name] * (1 - rate * decay_of(name, 0.2)) - momentum, [momentum, rows, columns]
        advance(layer, optimizer)
        torch.testing.assert_close(weights(layer), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_makes_each_projection_orthogonal_by_itself(adjust: Any) -> None:
    """The singular values of an orthogonal step are 1, those of five iterations between 0.5 and 1.5; AdamW steps the rest."""
    layer = Layer(torch.float32)
    config = OptimizerConfig(name="muon", learning_rate=0.1, adamw_learning_rate=0.01, weight_decay=0.0, adjust=adjust)
    optimizer = build_optimizer(config, [layer])
    assert isinstance(optimizer, Joined) and isinstance(optimizer.optimizers[0], Muon)
    before, found = weights(layer), gradients(layer)
    layer.linear.weight.data = layer.linear.weight.data.clone()  # somebody laid it elsewhere
    advance(layer, optimizer)
    moved = {name: before[name] - now for name, now in weights(layer).items()}
    for rows, part in zip((4, 8), moved["linear.weight"].split([4, 8]), strict=True):
        size = 0.1 * (0.2 * math.sqrt(max(rows, 6)) if adjust == "match_rms_adamw" else math.sqrt(max(1, rows / 6)))
        values = torch.linalg.svdvals(part / size)
        assert len(values) == min(rows, 6) and values.min() > 0.4 and values.max() < 1.6, values
    torch.testing.assert_close(moved["table"], 0.01 * found["table"].sign(), rtol=1e-3, atol=1e-5)  # AdamW's first step
    assert optimizer.optimizers[1].parameters[0].shape in ((12,), (9, 6)) and len(optimizer.parameters) == 3


def test_muon_is_that_of_pytorch_for_single_projections() -> None:
    torch.manual_seed(5)
    ours, theirs = Linear(6, 4, bias=False), torch.nn.Linear(6, 4, bias=False)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(OptimizerConfig(name="muon", learning_rate=0.1, weight_decay=0.2), [ours])
    plain = torch.optim.Muon(theirs.parameters(), lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient, version = torch.randn(4, 6), ours.weight._version
        ours.weight.grad, theirs.weight.grad = gradient.clone(), gradient.clone()
        optimizer.step(lambda: pytest.fail("Muon looks once")), plain.step()
        assert torch.equal(ours.weight, theirs.weight) and ours.weight._version > version
    optimizer.zero_grad()
    optimizer.step(lambda: pytest.fail("Muon looks once"))
    assert torch.equal(ours.weight, theirs.weight), "without a gradient it is left alone"


def test_schedule_free_adamw() -> None:
    """Gradients at y = (1 - b) z + b x; z steps; x is the mean of the z, weighted by the squares of the largest rate so far."""
    layer = Layer()
    optimizer = build_optimizer(OptimizerConfig(name="schedule_free_adamw", learning_rate=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2), [layer])
    x, z, v, total, largest = weights(layer), weights(layer), dict.fromkeys(weights(layer), 0.0), 0.0, 0.0
    for step, factor in enumerate((0.25, 0.5, 1.0, 1.0), 1):
        rate = 0.1 * factor
        largest = max(largest, rate)
        total += largest**2
        share = largest**2 / total
        y = {name: 0.1 * z[name] + 0.9 * x[name] for name in x}
        optimizer.train()
        torch.testing.assert_close(weights(layer), y)
        for name, gradient in gradients(layer).items():
            v[name] = 0.98 * v[name] + 0.02 * gradient.square()
            direction = gradient / ((v[name] / (1 - 0.98**step)).sqrt() + 1e-6) + decay_of(name, 0.2) * y[name]
            z[name] = z[name] - rate * direction
            x[name] = (1 - share) * x[name] + share * z[name]
        advance(layer, optimizer, factor=factor)
        kept = weights(layer)
        optimizer.eval()
        torch.testing.assert_close(weights(layer), x)
        version = layer.table._version
        optimizer.train()
        assert all(torch.equal(now, then) for now, then in zip(weights(layer).values(), kept.values(), strict=True)), "a look at x changes no bit"
        assert layer.table._version > version, "whoever packed a weight is told"


@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
def test_sharpness_aware_minimisation(eta: float | None) -> None:
    layer, check = Layer(), Layer()
    config = OptimizerConfig(name="sam", rho=0.3) if eta is None else OptimizerConfig(name="asam", rho=0.3, eta=eta)
    optimizer, base = build_optimizer(config, [layer]), build_optimizer(OptimizerConfig(), [check])
    for _ in range(3):
        w, found = weights(check), gradients(check)
        scale = {name: torch.ones_like(one) if eta is None else one.abs() + eta for name, one in w.items()}
        norm = torch.cat([(found[name] * scale[name]).flatten() for name in found]).norm()
        with torch.no_grad():
            for name, parameter in check.named_parameters():
                parameter += 0.3 * scale[name] ** 2 * found[name] / norm
        nearby = gradients(check)
        check.load_state_dict(w)
        for name, parameter in check.named_parameters():
            parameter.grad = nearby[name]
        base.clip(0.0), base.step(lambda: pytest.fail("AdamW looks once"))
        advance(layer, optimizer)
        torch.testing.assert_close(weights(layer), weights(check))


def test_sharpness_is_that_of_the_library() -> None:
    from pytorch_optimizer.optimizer.sam import SAM

    for adaptive in (False, True):
        layer, check = Layer(), Layer()
        theirs = SAM(check.parameters(), torch.optim.SGD, rho=0.2, adaptive=adaptive, lr=0.01)
        ours = SharpnessAware(Optimizer(torch.optim.SGD(layer.parameters(), lr=0.01)), 0.2, 0.0 if adaptive else None)
        for _ in range(3):
            advance(layer, ours)
            check.loss().backward()
            theirs.step(lambda check=check: check.loss().backward())
            theirs.zero_grad()
        torch.testing.assert_close(weights(layer), weights(check), rtol=1e-6, atol=1e-9)


def test_a_joined_clip_is_by_the_norm_of_all_gradients() -> None:
    layer = Layer()
    optimizer = build_optimizer(OptimizerConfig(name="muon"), [layer])
    norm = torch.cat([gradient.flatten() for gradient in gradients(layer).values()]).norm()
    layer.loss().backward()
    before = layer.linear.weight.grad.clone()
    assert float(optimizer.clip(0.5 * float(norm))) == pytest.approx(float(norm))
    torch.testing.assert_close(layer.linear.weight.grad, 0.5 * before, rtol=1e-5, atol=0)


# -- what goes where -----------------------------------------------------------------------------------------------------------------
def test_only_matrices_decay_in_any_mixer_and_projections_are_whole() -> None:
    """Decays of states, their steps, mixing ratios and skips do not; nor do norms, biases and tables."""
    free = {"A_log", "D", "step_bias", "decay", "bonus", "frequency", "skip", "mix", "mix_first", "bias", "source"}
    for name in MIXERS:
        config = ModelConfig(d_model=16, ffn=32, heads=2, encoder_layers=1, decoder_layers=1, encoder_mixers=[name], decoder_mixers=[name], max_length=32)
        for module in CVMTransformer(config, 40).modules():
            for own, parameter in module.named_parameters(recurse=False):
                assert not (own in free and decays(module, own)), (name, own)
                assert decays(module, own) <= (parameter.dim() == 2)
                rows = projection_rows(module, own)
                assert rows is None or (sum(rows) == len(parameter) and parameter.dim() == 2 and decays(module, own))
    assert projection_rows(Linear(4, [2, 6]), "weight") == (2, 6) and projection_rows(Linear(4, [2, 6]), "bias") is None
    assert projection_rows(torch.nn.Linear(4, 3), "weight") == (3,) and projection_rows(torch.nn.Conv1d(2, 2, 1), "weight") is None


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path) -> None:
    monkeypatch.setattr(optimizer_config.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pipeline, "load_corpora", lambda data: pytest.fail("it is known before anything is read"))
    of_teacher = ["teacher.optimizer.name=sam", "teacher.optimizer.base=lion"]
    for overrides, key in ((["optimizer.name=lion"], "optimizer.name"), (of_teacher, "teacher.optimizer.base")):
        with pytest.raises(ConfigError, match=f"^{key} = \"lion\" needs the package pytorch-optimizer: pip install 'cvmk\\[optimizers\\]'$"):
            train(config, *overrides)
        assert main(["train", str(config), "--check", *(word for one in overrides for word in ("--set", one))]) == 2
        assert f'{key} = "lion" needs the package' in capsys.readouterr().err
    optimizer_config.check_optimizer(OptimizerConfig(name="muon"))


# -- in a training step --------------------------------------------------------------------------------------------------------------
def setting(name: str, **options: Any) -> Setting:
    made = Setting(teacher=True, clip_norm=0.5)
    optimizer = build_optimizer(OptimizerConfig(name=name, **options), (made.model, made.objective))
    return made.driven_by(optimizer)


@pytest.mark.parametrize(("name", "base"), [*((name, None) for name in NAMES), *OVER])
def test_a_state_that_was_saved_goes_on_bit_for_bit(name: Any, base: Any) -> None:
    """Three steps, a state that passes through a file into fresh objects, three more; with accumulated batches, and dropout to be repeated."""
    options = {} if base is None else {"base": base}
    made = [batches([[step, step + 1], [step + 4]]) for step in range(6)]
    straight = setting(name, **options)
    for step in range(6):
        torch.manual_seed(step)
        straight.step(made[step], 1 / (1 + step))
    first, then = setting(name, **options), setting(name, **options)
    for step in range(3):
        torch.manual_seed(step)
        first.step(made[step], 1 / (1 + step))
    first.optimizer.eval()
    buffer = io.BytesIO()
    torch.save({"weights": [first.model.state_dict(), first.objective.state_dict()], "optimizer": first.optimizer.state_dict()}, buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    for module, weights in zip((then.model, then.objective), saved["weights"], strict=True):
        module.load_state_dict(weights)
    then.optimizer.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        torch.manual_seed(step)
        then.step(made[step], 1 / (1 + step))
    for one, other in ((straight, then), (straight, then)):
        assert all(torch.equal(a, b) for a, b in zip(one.weights(), other.weights(), strict=True))
        one.optimizer.eval(), other.optimizer.eval()
    states = [torch.utils._pytree.tree_leaves(one.optimizer.state_dict()) for one in (straight, then)]
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("name", ["sam", "asam"])
def test_a_second_gradient_that_is_not_finite_changes_no_weight_and_is_told(name: str) -> None:
    made = setting(name)
    before, seen = made.weights(), []
    parameter = next(made.model.parameters())
    parameter.register_hook(lambda gradient: seen.append(1) or (gradient if len(seen) == 1 else gradient * math.inf))
    result = made.step(batches([[0, 1]]), 1.0)
    assert len(seen) == 2 == result.passes and not math.isfinite(result.norm)
    assert all(torch.equal(now, then) for now, then in zip(made.weights(), before, strict=True))
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_sharpness_takes_all_accumulated_batches_again() -> None:
    """Two batches are one large one, at the weights and beside them."""

    def stepped(*groups: list[int]) -> Setting:
        made = Setting()
        made.driven_by(SharpnessAware(Optimizer(torch.optim.SGD(made.model.parameters(), lr=0.5)), 0.05)).step(batches(groups), 1.0)
        return made

    whole, parts, half = stepped([0, 1, 2, 3]), stepped([0, 1], [2, 3]), stepped([0, 1])
    for a, b in zip(whole.weights(), parts.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(whole.weights(), half.weights(), strict=True))


def test_a_second_pass_is_no_part_of_the_optimisers_time() -> None:
    """Whoever profiles sees each phase by itself."""
    made, inside, seen = setting("sam"), [], []

    @contextlib.contextmanager
    def span(name: str) -> Iterator[None]:
        seen.append((*inside, name))
        inside.append(name)
        yield
        assert inside.pop() == name

    with nvtx.told(span):
        assert made.step(batches([[0, 1]]), 1.0).passes == 2
    assert not inside and {len(names) for names in seen} == {1}
    names = [name for (name,) in seen]
    assert [names.count(name) for name in ("forward", "backward", "optimiser")] == [2, 2, 2] and names[-1] == "optimiser"


# -- whole runs ----------------------------------------------------------------------------------------------------------------------
SHORT = ["validation.max_sentences=3", "validation.validate_every=100", "training.max_tokens=200", "training.accumulate=2", "model.attention_dropout=0.1"]


@pytest.mark.parametrize("name", NAMES)
def test_six_iterations_are_three_and_three(name: str, config: Path, tmp_path: Path) -> None:
    """The second run validates and saves in the middle, which the first does not; what was validated and saved are the weights to be used."""
    options = [*SHORT, f"optimizer.name={name}"]
    straight, stopped = (f"run.folder={tmp_path / folder}" for folder in ("straight", "stopped"))
    train(config, *options, straight, "training.iterations=6")
    train(config, *options, stopped, "training.iterations=3")
    train(config, *options, stopped, "training.iterations=6", resume=True)
    for file in ("model.safetensors", "state.pt"):
        one, other = (followed(tmp_path / folder / "checkpoints" / "last") / file for folder in ("straight", "stopped"))
        assert one.read_bytes() == other.read_bytes(), file
    results = [[event["value"] for event in events(tmp_path / folder, "validation")][-1] for folder in ("straight", "stopped")]
    assert results[0] == results[1]


def test_a_rollback_takes_both_sets_of_weights_back(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def strike(trainer: Trainer) -> None:
        optimizer = trainer.state.optimizer
        assert isinstance(optimizer, ScheduleFree)
        if trainer.progress.step == 3 and not seen:
            trained = copy.deepcopy(optimizer.parameters)
            optimizer.eval()
            seen.append(([one.detach() for one in trained], [one.detach().clone() for one in optimizer.parameters]))
        if trainer.progress.step == 5 and trainer.progress.rollbacks == 0:
            optimizer.parameters[0].data.fill_(math.nan)

    original = Trainer._roll_back

    def roll_back(trainer: Trainer, problem: str, kind: str) -> bool:
        found = original(trainer, problem, kind)
        optimizer = trainer.state.optimizer
        trained, used = seen[0]
        assert not all(torch.equal(one, other) for one, other in zip(trained, used, strict=True))
        assert all(torch.equal(now, then) for now, then in zip(optimizer.parameters, used, strict=True))
        optimizer.train()
        assert all(torch.equal(now, then) for now, then in zip(optimizer.parameters, trained, strict=True))
        return found

    monkeypatch.setattr(Trainer, "_roll_back", roll_back)
    options = [*SHORT[:1], "validation.validate_every=3", *SHORT[2:], "optimizer.name=schedule_free_adamw", "training.iterations=6", "training.save_every=1"]
    report = train(config, *options, on_step=strike, monkeypatch=monkeypatch)
    (rollback,) = events(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["to"], report["rollbacks"]) == (5, 3, 1) and "not finite" in rollback["problem"]
