"""What the training step asks of an optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Tensor]
"""Computes the gradients of the same batches anew, at the present weights; returns the loss, a scalar. They are clipped and summed
over all processes as the first ones were. Raises NotFiniteError where loss or gradient are not finite: let it pass, with the weights as they were."""


class NotFiniteError(Exception):
    """A loss or a gradient that must change no weight."""


class Optimizer:
    """An optimiser of torch.optim, or of the same form, as the training step drives it.

    Each parameter group keeps the learning rate that it was made with as its peak; `set_factor` scales all of them alike. What has
    weights for training and others for use (schedule-free), or looks at the gradients twice (SAM), overrides `train` and `eval`, or `step`.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.parameters: list[torch.nn.Parameter] = [parameter for group in inner.param_groups for parameter in group["params"]]
        self._peaks = [group["lr"] for group in inner.param_groups]

    def set_factor(self, factor: float) -> None:
        """The learning rate of every group is its peak times `factor` from now on."""
        for group, peak in zip(self.inner.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def clip(self, norm: float) -> Tensor:
        """Scale all gradients down to this norm, where theirs is larger (0: never). Returns their norm before, a scalar; not finite where a gradient is not."""
        found = self.gradient_norm()
        self.scale_down(norm, found)
        return found

    def gradient_norm(self) -> Tensor:
        """Of all gradients, a scalar. Called once, before `scale_down`, when they are complete."""
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def scale_down(self, norm: float, found: Tensor) -> None:
        """Scale the gradients by norm / found where that is below 1 (norm 0: never); `found` is the norm of these gradients and of all that go with them."""
        torch.nn.utils.clip_grads_with_norm_(self.parameters, norm or float("inf"), found)

    def step(self, closure: Closure) -> None:
        """Change the weights by the gradients that are there. `closure` is for those who want the gradients at other weights, too."""
        self.inner.step()

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=True)

    def train(self) -> None:
        """Let the model have the weights that gradients are computed at. Called before every step."""

    def eval(self) -> None:
        """Let the model have the weights to be used. Called before a validation and before a checkpoint is written: a checkpoint holds these."""

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state that was saved after `eval`. Raises ValueError or KeyError where it is of another optimiser."""
        self.inner.load_state_dict(state)
