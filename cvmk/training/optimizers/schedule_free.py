"""Schedule-free AdamW (Defazio et al. 2024): weights to train with, and their average to be used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.training.optimizers.base import Optimizer


class ScheduleFree(Optimizer):
    """An optimiser of pytorch-optimizer's form, with `eval`, whose averages are read off the weights that are trained.

    Those are kept while the model has the averages, and come back bit for bit: that somebody validates or saves changes nothing in a run. A checkpoint
    holds both.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self._kept: list[Tensor] | None = None

    @torch.no_grad()
    def train(self) -> None:
        if self._kept is not None:
            for parameter, kept in zip(self.parameters, self._kept, strict=True):
                parameter.copy_(kept)
            self._kept = None
            self._mark(True)

    @torch.no_grad()
    def eval(self) -> None:
        if self._kept is None:
            self._kept = [parameter.detach().clone() for parameter in self.parameters]
            averaging: Any = self.inner
            averaging.eval()
            torch.autograd.graph.increment_version(self.parameters)  # it changed them behind autograd's back

    def _mark(self, trains: bool) -> None:
        for group in self.inner.param_groups:
            group["train_mode"] = trains

    def state_dict(self) -> dict[str, Any]:
        if self._kept is None:
            raise RuntimeError("the model has the weights of training: call eval before state_dict, so that it has the ones to be used")
        return {**self.inner.state_dict(), "training_weights": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kept = state["training_weights"]
        if [tensor.shape for tensor in kept] != [parameter.shape for parameter in self.parameters]:
            raise ValueError("the weights of training have other shapes than the model's")
        self.inner.load_state_dict({name: value for name, value in state.items() if name != "training_weights"})
        self._kept = [tensor.to(parameter.device, parameter.dtype, copy=True) for tensor, parameter in zip(kept, self.parameters, strict=True)]
        self._mark(False)
