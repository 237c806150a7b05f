"""Linear layers with their activation inside, so that a quantised or fused layer can stand in for one: same call, same result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvmk import ops

Activation = Literal["relu", "gelu", "silu", "swiglu"]
"""As in `ops.int8_linear`: gelu is exact (by erf); swiglu (Shazeer 2020) reads the rows [gate; up] and gives silu(gate) * up, half as wide."""


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    """x [..., N] -> [..., N], or [..., N / 2] for swiglu; None is the identity. Raises ValueError for an unknown activation."""
    match activation:
        case None:
            return x
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "silu":
            return F.silu(x)
        case "swiglu":
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up
    raise ValueError(f"activation is {activation!r}, and must be None or one of {', '.join(get_args(Activation))}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    """activation(x W^T + b): x [..., K], weight [N, K] -> [..., N] (half of them for swiglu).

    One fused operation where a model is trained: there are gradients to be made, or weights to be rounded for autocast. Elsewhere it would save nothing,
    and PyTorch's own calls are the quicker ones on the few rows of a step of decoding.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return ops.fused_linear(x, weight, bias, activation=activation)
    return activate(F.linear(x, weight, bias), activation)


class Linear(nn.Linear):
    """activation(x W^T + b). The rows of W stack one or more projections, each with its own Xavier initialisation; b begins at 0.

    outputs          rows of each projection; one number for a single one.
    scale            factor of the initial weights.
    residual_output  whether the result is added to the residual stream: `scale_residual_outputs` looks for it.
    """

    decayed = ("weight",)

    def __init__(self, inputs: int, outputs: int | Sequence[int], *, bias: bool = True, scale: float = 1.0, residual_output: bool = False) -> None:
        parts = [outputs] if isinstance(outputs, int) else list(outputs)
        super().__init__(inputs, sum(parts), bias=bias)
        self.residual_output = residual_output
        self.projections = {"weight": tuple(parts)}
        with torch.no_grad():
            for part in self.weight.split(parts):
                nn.init.xavier_uniform_(part).mul_(scale)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """x [..., inputs] -> [..., outputs] (half of them for swiglu)."""
        return linear(x, self.weight, self.bias, activation)


class TiedLinear(nn.Module):
    """activation(x W^T) by a matrix that is a parameter of another module, or a layer in it that holds the matrix: it is trained, saved, counted and cast
    there only."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, the owner does not become a child of its own child
        self._name = name

    @property
    def weight(self) -> Tensor:
        """W [N, K], the owner's present parameter, or what its layer says W is."""
        found: Any = getattr(self._owner[0], self._name)
        weight: Tensor = found if isinstance(found, Tensor) else found.matrix()
        return weight

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """x [..., K] -> [..., N] (half of them for swiglu)."""
        found: Any = getattr(self._owner[0], self._name)
        if isinstance(found, Tensor):
            return activate(F.linear(x, found), activation)
        projected: Tensor = found(x, activation)
        return projected


def scale_residual_outputs(module: nn.Module) -> None:
    """Divide the initial weights of the layers marked `residual_output` by sqrt(how many they are), so that the variance of the
    residual stream does not grow with depth (Radford et al. 2019)."""
    outputs = [layer for layer in module.modules() if isinstance(layer, Linear) and layer.residual_output]
    with torch.no_grad():
        for layer in outputs:
            layer.weight.mul_(len(outputs) ** -0.5)
