"""The hash of `cvmk.ops._dropout` in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on int32 words, which wrap as uint32 do; shifts are made logical by a mask."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -0x7A143595
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -0x3D4D51CB
    return x ^ ((x >> 16) & 0xFFFF)


def key_of(seed: Tensor) -> Tensor:
    """A seed's key, [1] int32."""
    words = seed.to(torch.int32)
    return mix(mix(words[:1]) ^ words[1:])


def counting(n: int, device: torch.device) -> Tensor:
    """0 to n - 1, int32."""
    return torch.arange(n, dtype=torch.int32, device=device)


def column_words(key: Tensor, n: int) -> Tensor:
    """The hashes [n] of columns."""
    return mix(mix(counting(n, key.device)) ^ key)


def at_least(hashes: Tensor, p: float) -> Tensor:
    """Which elements with these hashes are kept. Unsigned order as signed: both sides less 2^31."""
    return (hashes ^ -(2**31)) >= int(p * 2**32) - 2**31


def kept_rows(seed: Tensor | None, p: float, rows: int, n: int) -> Tensor | None:
    """Which elements of one matrix are kept: bool [rows, n]; None where all are."""
    if seed is None or p <= 0:
        return None
    key = key_of(seed)
    row = mix(mix(key) + counting(rows, seed.device))
    return at_least(mix(row[:, None] ^ column_words(key, n)), p)
