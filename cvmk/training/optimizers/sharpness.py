"""Sharpness-aware minimisation around any optimiser: the gradient is that of weights nearby where the loss is larger."""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk.training.optimizers.base import Closure, Optimizer
from cvmk.training.optimizers.joined import Joined

_EPSILON = 1e-12


class SharpnessAware(Joined):
    """SAM (Foret et al. 2021): `base` steps from w by the gradient at w + rho g / |g|. Adaptive (ASAM, Kwon et al. 2021), where `eta` is given: at
    w + rho T^2 g / |T g| with T = |w| + eta, so that rescaled weights have the same neighbours. Norms are over all weights.

    It remembers nothing between steps. A step takes two passes over the batches, and room for two copies of the weights (adaptive: three).
    """

    def __init__(self, base: Optimizer, rho: float, eta: float | None = None) -> None:
        super().__init__(base)
        self._rho, self._eta = rho, eta

    def step(self, closure: Closure) -> None:
        """As of `Optimizer`. The weights are as before where the second gradient cannot be had."""
        moved: list[Tensor] = [parameter for parameter in self.parameters if parameter.grad is not None]
        before = [parameter.detach().clone() for parameter in moved]
        with torch.no_grad():
            for parameter, away in zip(moved, self._away(moved), strict=True):
                parameter += away
        try:
            closure()
        finally:
            with torch.no_grad():
                torch._foreach_copy_(moved, before)
        super().step(closure)

    def _away(self, moved: list[Tensor]) -> list[Tensor]:
        """What takes each parameter to where the second gradient is computed."""
        gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
        if self._eta is None:
            return list(torch._foreach_mul(gradients, self._per(gradients)))
        scales = list(torch._foreach_abs(moved))
        torch._foreach_add_(scales, self._eta)
        away = list(torch._foreach_mul(gradients, scales))
        torch._foreach_mul_(scales, self._per(away))
        torch._foreach_mul_(away, scales)
        return away

    def _per(self, tensors: list[Tensor]) -> Tensor:
        """rho over the norm of all of them."""
        per: Tensor = self._rho / (torch.nn.utils.get_total_norm(tensors) + _EPSILON)
        return per
