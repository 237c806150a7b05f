"""The optimiser over a model's and an objective's parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cvmk.config import OptimizerConfig
from cvmk.nn import decays


def build_optimizer(config: OptimizerConfig, modules: Iterable[torch.nn.Module]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused where PyTorch has it. Weight decay applies as `cvmk.nn.decays` says."""
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
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    first = (decayed + plain)[0]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=_has_fused(first))


def _has_fused(parameter: torch.nn.Parameter) -> bool:
    try:
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1, dtype=parameter.dtype, device=parameter.device))], fused=True)
    except RuntimeError:
        return False
    return True
