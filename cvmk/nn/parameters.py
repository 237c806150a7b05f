"""What is asked about a module's parameters: how many, which of them decay, and which are projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def projection_rows(module: nn.Module, name: str) -> Sequence[int] | None:
    """The rows of each projection that the module's own parameter `name` (no dot in it) stacks; None where it is no matrix that vectors are multiplied by.

    A module says so by an attribute `projections`, from names of its parameters to such rows. A module that says nothing has none, but for
    `torch.nn.Linear`, whose weight is one.
    """
    declared: Mapping[str, Sequence[int]] = getattr(module, "projections", {"weight": (module.out_features,)} if isinstance(module, nn.Linear) else {})
    return declared.get(name)
