"""The last few inputs of each row, which token shift remembers."""

from __future__ import annotations

import torch
from torch import Tensor

from cvmk.nn.positions import Span
from cvmk.nn.state import MixerState


def after_zeros(x: Tensor, count: int) -> Tensor:
    """x [N, T, C] behind `count` zeros, [N, count + T, C]: what stands before a sequence."""
    return torch.nn.functional.pad(x, (0, 0, count, 0))


def after_recent(x: Tensor, span: Span, state: MixerState, name: str) -> Tensor:
    """x [N, T, C] behind the inputs that `state[name]` [N, count, C] remembers, [N, count + T, C]; the state becomes the last ones that are real."""
    recent = state[name]
    count, joined = recent.shape[1], torch.cat((recent.to(x.dtype), x), dim=1)
    if span.lengths is None:
        recent.copy_(joined[:, joined.shape[1] - count :])
    else:
        at = span.lengths.to(x.device)[:, None] + torch.arange(count, device=x.device)
        recent.copy_(joined[torch.arange(x.shape[0], device=x.device)[:, None], at])
    return joined
