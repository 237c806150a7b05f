"""Several optimisers as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.training.optimizers.base import Closure, Optimizer


class Joined(Optimizer):
    """Optimisers that have parameters of their own each, clipped by the norm of all gradients."""

    def __init__(self, *optimizers: Optimizer) -> None:  # there is no one inner optimiser
        self.optimizers = optimizers
        self.parameters = [parameter for optimizer in optimizers for parameter in optimizer.parameters]

    def set_factor(self, factor: float) -> None:
        for optimizer in self.optimizers:
            optimizer.set_factor(factor)

    def gradient_norm(self) -> Tensor:
        found: Tensor = torch.linalg.vector_norm(torch.stack([optimizer.gradient_norm() for optimizer in self.optimizers]))
        return found

    def scale_down(self, norm: float, found: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.scale_down(norm, found)

    def step(self, closure: Closure) -> None:
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def train(self) -> None:
        for optimizer in self.optimizers:
            optimizer.train()

    def eval(self) -> None:
        for optimizer in self.optimizers:
            optimizer.eval()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
