"""What recurrences that are written in PyTorch compute in: the dtype of their state, whatever the model and autocast have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from cvmk.nn.mixers.recurrence import state_dtype


def exact(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype of a state."""
    return [x.to(state_dtype(x.dtype)) for x in tensors]


def exactly(like: Tensor) -> AbstractContextManager[object]:
    """Products on the device of `like` in their operands' dtype, under autocast too."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
