"""What is asked about a module's parameters: how many, and which of them decay."""

from __future__ import annotations

from torch import nn


def count_parameters(module: nn.Module) -> int:
    """Number of weights; shared matrices count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def decays(module: nn.Module, name: str) -> bool:
    """Whether weight decay applies to the module's own parameter `name` (no dot in it).

    A module says so by an attribute `decayed`, the names of its parameters that do. A module that says nothing has none, but for
    `torch.nn.Linear`, whose weight does.
    """
    declared = getattr(module, "decayed", ("weight",) if isinstance(module, nn.Linear) else ())
    return name in declared
