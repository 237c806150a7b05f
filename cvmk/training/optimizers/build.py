"""From `[optimizer]` to an optimiser: the parameter groups, and one builder a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from cvmk.config import OptimizerConfig
from cvmk.errors import ConfigError
from cvmk.nn import decays
from cvmk.training.optimizers.base import Optimizer
from cvmk.training.optimizers.flat_adamw import FlatAdamW

Groups = list[dict[str, Any]]


def build_optimizer(config: OptimizerConfig, modules: Iterable[torch.nn.Module]) -> Optimizer:
    """The optimiser that `config` names, over the parameters of `modules` that ask for a gradient, each once.

    Raises ConfigError where there is none.
    """
    return BUILDERS[config.name](config, parameter_groups(config, modules))


def parameter_groups(config: OptimizerConfig, modules: Iterable[torch.nn.Module]) -> Groups:
    """Two groups in the form of torch.optim: what decays, as `cvmk.nn.decays` says, and what does not."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    seen: set[int] = set()
    for root in modules:
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                (decayed if decays(module, name) else plain).append(parameter)
    if not seen:
        raise ConfigError("no parameter of the model asks for a gradient: there is nothing to train")
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _adamw(config: OptimizerConfig, groups: Groups) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019): over flat memory on the CPU, else PyTorch's, fused where it has that."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = _has_fused(parameters[0])
    inner = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)
    return FlatAdamW(inner) if FlatAdamW.takes(parameters) else Optimizer(inner)


def _has_fused(parameter: torch.nn.Parameter) -> bool:
    try:
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1, dtype=parameter.dtype, device=parameter.device))], fused=True)
    except RuntimeError:
        return False
    return True


BUILDERS: dict[str, Callable[[OptimizerConfig, Groups], Optimizer]] = {"adamw": _adamw}
"""By `optimizer.name`; a test compares the names with the schema's."""
