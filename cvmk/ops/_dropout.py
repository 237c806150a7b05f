"""Dropout by a counter: whether an element stays is a hash of a seed and of where it stands, so that no mask is stored and a backward pass makes it again.

A seed is two 32-bit words s0, s1, drawn from torch's generator for the device. All in unsigned 32-bit arithmetic, with mix = the finaliser of
MurmurHash3 (Appleby): x ^= x >> 16; x *= 0x85ebca6b; x ^= x >> 13; x *= 0xc2b2ae35; x ^= x >> 16:
    key = mix(mix(s0) ^ s1),  row = mix(mix(key + g) + i),  column = mix(key ^ mix(j)),
and element (g, i, j) is kept where mix(row ^ column) >= floor(p 2^32); kept ones are divided by 1 - p. g counts whatever holds rows (attention's heads;
0 where there is only one such), i its rows, j its columns. `csrc/common/dropout.h` computes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvmk.ops._call import number

NO_DROPOUT = (1.0, 0, 0)
"""The factor of what stays, and the key and limit of the generator, where nothing is dropped."""


def checked_probability(dropout_p: Any) -> float:
    """The probability to be dropped. Raises TypeError for a tensor that asks for a gradient, ValueError outside of [0, 1)."""
    p = number("dropout_p", dropout_p)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), not {p}")
    return p


def draw_seed(device: torch.device) -> Tensor:
    """A seed [2] of torch's generator for the device."""
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64, device=device)


def words(seed: Tensor | None, p: float) -> tuple[float, int, int]:
    """1 / (1 - p), the generator's key and the limit under which an element is dropped."""
    if seed is None or p <= 0:
        return NO_DROPOUT
    first, second = (int(word) & 0xFFFFFFFF for word in seed.tolist())
    return 1.0 / (1.0 - p), _mix(_mix(first) ^ second), int(p * 2**32)


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16
