"""The one seam between sublayers: drop, add, and the norm of what comes next."""

from __future__ import annotations

from torch import Tensor, nn


def residual(x: Tensor, branch: Tensor, dropout: nn.Dropout, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + dropout(branch), and its norm: the residual stream x [..., d] and the result [..., d] of the sublayer before it -> two tensors [..., d].

    norm is that of the next sublayer, or of the stack behind the last one. Whatever stands between two sublayers is done
    here and nowhere else, so that one fused operation can do it.
    """
    x = x + (dropout(branch) if dropout.training else branch)
    normed: Tensor = norm(x)
    return x, normed
