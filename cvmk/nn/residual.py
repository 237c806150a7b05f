"""The one seam between sublayers: drop, add, and the norm of what comes next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cvmk import ops

_KINDS: dict[type[nn.Module], str] = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}


def residual(x: Tensor, branch: Tensor, dropout: nn.Dropout, norm: Any) -> tuple[Tensor, Tensor]:
    """x + dropout(branch), and its norm: the residual stream x [..., d] and the result [..., d] of the sublayer before it -> two tensors [..., d].

    norm is that of the next sublayer, or of the stack behind the last one. Whatever stands between two sublayers is done
    here and nowhere else, by one operation. Under autocast the norm has autocast's dtype, in which the next product reads it; the
    residual stream keeps its own.
    """
    p = probability(dropout)
    kind = _kind(norm)
    if kind is None or p >= 1:
        x = x + dropout(branch)
        normed: Tensor = norm(x)
        return x, normed
    weights = norm._parameters
    return ops.residual_norm(x, branch, weights["weight"], weights.get("bias"), norm=kind, eps=_eps(norm, x), dropout_p=p)


def first_norm(x: Tensor, norm: Any) -> Tensor:
    """The norm of a stack's input, which no sublayer stands before: x [..., d] -> [..., d], in the dtype that `residual` gives."""
    kind = _kind(norm)
    if kind is None:
        normed: Tensor = norm(x)
        return normed
    weights = norm._parameters
    return ops.residual_norm(x, None, weights["weight"], weights.get("bias"), norm=kind, eps=_eps(norm, x))[1]


def probability(dropout: nn.Dropout | None) -> float:
    """With which a module drops an element now."""
    return dropout.p if dropout is not None and dropout.training else 0.0


def _kind(norm: Any) -> str | None:
    """The op's name for a norm that it can do; None for a module of another kind, and for one whose hooks are to see what goes in and out."""
    kind = _KINDS.get(type(norm))
    return None if kind is None or norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._parameters.get("weight") is None else kind


def _eps(norm: Any, x: Tensor) -> float:
    eps: float = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return eps
