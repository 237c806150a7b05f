"""Memory for large results: blocks that are used again, since fresh pages cost as much as the kernel that writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cvmk.ops import native

LARGE = 2**20
"""Bytes of a tensor from which on the library's blocks are used."""
NUMBER = torch.empty((), dtype=torch.float32, device="cpu")
"""What small results in float32 are made of: `NUMBER.new_empty(2, 3)` is PyTorch's fastest way; torch.empty with a shape and a dtype takes twice as long."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor with any values, as `torch.empty` makes it. The memory of a large one goes back to the library when its last view dies.

    Up to CVMK_KEPT_MIB MiB (an environment variable, 512 by default, 0 for none) wait there for their next use; the system may take the
    pages of all but the last 32 MiB meanwhile. The storage cannot be resized. Where deterministic algorithms are asked for, `torch.empty` makes it all.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < LARGE:
        return torch.empty(shape, dtype=dtype)
    library = native.library()
    if library is None or torch.are_deterministic_algorithms_enabled():
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(library.Buffer(count * dtype.itemsize), dtype=dtype).view(shape)
