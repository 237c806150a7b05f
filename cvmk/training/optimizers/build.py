"""From `[optimizer]` to an optimiser: the parameter groups, and one builder a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from cvmk.config import OptimizerConfig
from cvmk.config.optimizer import check_optimizer
from cvmk.errors import ConfigError
from cvmk.nn import decays, projection_rows
from cvmk.training.optimizers.base import Optimizer
from cvmk.training.optimizers.flat_adamw import FlatAdamW
from cvmk.training.optimizers.joined import Joined
from cvmk.training.optimizers.muon import Muon
from cvmk.training.optimizers.schedule_free import ScheduleFree
from cvmk.training.optimizers.sharpness import SharpnessAware

Groups = list[dict[str, Any]]
Rows = Mapping[int, Sequence[int]]
"""By id of a parameter that is a projection: what `cvmk.nn.projection_rows` says."""
Builder = Callable[[OptimizerConfig, Groups, Rows], Optimizer]


def build_optimizer(config: OptimizerConfig, modules: Iterable[torch.nn.Module]) -> Optimizer:
    """The optimiser that `config` names, over the parameters of `modules` that ask for a gradient, each once.

    Raises ConfigError where there is none, and where a package is missing.
    """
    check_optimizer(config)
    modules = list(modules)
    rows = {id(parameter): found for module, name, parameter in _trained(modules) if (found := projection_rows(module, name)) is not None}
    built = BUILDERS[config.stepper](config, parameter_groups(config, modules), rows)
    return built if config.rho is None else SharpnessAware(built, config.rho, config.eta)


def parameter_groups(config: OptimizerConfig, modules: Iterable[torch.nn.Module]) -> Groups:
    """Two groups in the form of torch.optim: what decays, as `cvmk.nn.decays` says, and what does not."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for module, name, parameter in _trained(modules):
        (decayed if decays(module, name) else plain).append(parameter)
    if not decayed and not plain:
        raise ConfigError("no parameter of the model asks for a gradient: there is nothing to train")
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _trained(modules: Iterable[torch.nn.Module]) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    """Every parameter that asks for a gradient, once, with the first module that owns it and its name there."""
    seen: set[int] = set()
    for root in modules:
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield module, name, parameter


def _adamw(config: OptimizerConfig, groups: Groups, rows: Rows) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019): over flat memory on the CPU, else PyTorch's, fused where it has that."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = _has_fused(parameters[0])
    rate = config.adamw_learning_rate or config.learning_rate
    inner = torch.optim.AdamW(groups, lr=rate, fused=fused, **_given(config, "betas", "eps"))
    return FlatAdamW(inner) if FlatAdamW.takes(parameters) else Optimizer(inner)


def _has_fused(parameter: torch.nn.Parameter) -> bool:
    try:
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1, dtype=parameter.dtype, device=parameter.device))], fused=True)
    except RuntimeError:
        return False
    return True


def _lion(config: OptimizerConfig, groups: Groups, rows: Rows) -> Optimizer:
    """Lion (Chen et al. 2023)."""
    from pytorch_optimizer.optimizer.lion import Lion

    return Optimizer(Lion(groups, lr=config.learning_rate, **_given(config, "betas")))


def _adafactor(config: OptimizerConfig, groups: Groups, rows: Rows) -> Optimizer:
    """Adafactor (Shazeer & Stern 2018) with momentum, by the rates of `[schedule]` in place of its own (as of Zhai et al. 2022)."""
    from pytorch_optimizer.optimizer.adafactor import AdaFactor

    options = _given(config, "betas", "clip_threshold", "scale_parameter")
    dtype = getattr(torch, config.momentum_dtype or "float32")
    return Optimizer(AdaFactor(groups, lr=config.learning_rate, momentum_dtype=dtype, relative_step=False, **options))


def _muon(config: OptimizerConfig, groups: Groups, rows: Rows) -> Optimizer:
    """Muon for projections, AdamW for the rest."""

    def only(projections: bool) -> Groups:
        found = [{**group, "params": [one for one in group["params"] if (id(one) in rows) is projections]} for group in groups]
        return [group for group in found if group["params"]]

    parts: list[Optimizer] = []
    if matrices := only(True):
        options = {**_given(config, "momentum", "nesterov"), "ns_steps": config.newton_schulz, "adjust_lr_fn": config.adjust}
        parts.append(Muon(matrices, rows, lr=config.learning_rate, **options))
    if rest := only(False):
        parts.append(_adamw(config, rest, rows))
    return Joined(*parts)


def _schedule_free_adamw(config: OptimizerConfig, groups: Groups, rows: Rows) -> Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024)."""
    from pytorch_optimizer.optimizer.schedulefree import ScheduleFreeAdamW

    return ScheduleFree(ScheduleFreeAdamW(groups, lr=config.learning_rate, **_given(config, "betas", "eps")))


def _given(config: OptimizerConfig, *keys: str) -> dict[str, Any]:
    """Keys that the constructor calls as the configuration does."""
    return {key: getattr(config, key) for key in keys}


BUILDERS: dict[str, Builder] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
    "schedule_free_adamw": _schedule_free_adamw,
}
"""By `optimizer.name`, or its base; a test compares the names with the schema's."""
