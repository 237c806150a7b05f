"""A call of `flash_attention` as its Triton kernels take it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvmk.ops.attention import Call
from cvmk.ops.triton import _launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256
"""The largest head size."""
FAR = 1 << 30
"""Farther than any key."""
SHORT = 64
"""Most rows, and most keys, of a tile that is a whole sequence; half of it in float32, whose products take thrice the registers."""


@dataclass(frozen=True)
class Sizes:
    """What calls of the same sizes have in common, and the numbers that every kernel takes in one order."""

    packed: bool
    batch: int
    kv_heads: int
    group: int
    rows: int
    keys: int
    constants: dict[str, Any]  # D, DV and their padded sizes, EARLY, CAP, LEFT, STEPS, PRECISION
    strides: tuple[int, ...]  # of q, k and v: [batch, heads, rows] each
    bias_strides: tuple[int, ...]
    numbers: tuple[Any, ...]  # kv_heads to threshold
    keep_scale: float
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def pairs(self) -> int:
        """Batch items times heads of keys."""
        return self.batch * self.kv_heads

    @functools.cached_property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def out_strides(self, width: int) -> tuple[int, int, int]:
        """[batch, heads, rows] of a contiguous result [B, H, Tq, width], or packed [total, H, width]."""
        if self.packed:
            return 0, width, self.heads * width
        return self.heads * self.rows * width, self.rows * width, width

    def empty(self, width: int) -> Tensor:
        shape = (self.rows, self.heads, width) if self.packed else (self.batch, self.heads, self.rows, width)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def statistic(self) -> Tensor:
        """One float32 a row and head."""
        shape = (self.heads, self.rows) if self.packed else (self.batch, self.heads, self.rows)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    @functools.cached_property
    def width(self) -> str:
        """The beginning of the call's keys in the tuning tables."""
        return f"{str(self.dtype).removeprefix('torch.')} d{max(self.constants['D_PADDED'], self.constants['DV_PADDED'])}"

    @functools.cached_property
    def long(self) -> str:
        """The key of sequences of any length: packed ones that are short on average, or whether there is more to a score than a product."""
        if self.packed and self.rows <= SHORT * self.numbers[4]:
            return f"{self.width} pieces"
        return f"{self.width} {'extra' if self.constants['EARLY'] or self.keep_scale > 1 else 'long'}"

    @functools.cached_property
    def one_tile(self) -> str:
        """The key of short sequences."""
        return f"{self.width} {padded(min(self.rows * self.group, SHORT))}x{padded(self.keys)}"


@dataclass(frozen=True)
class Given:
    """The tensors of a backward pass."""

    inputs: tuple[Tensor | None, ...]  # q, k, v, bias and the masks
    bias: Tensor | None
    grad: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor
    scale: float


def rows_contiguous(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension is not contiguous (a gradient may be an expanded number)."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """[batch, heads, rows] of [B, H, T, n], or of packed [total, H, n] with a batch stride of 0."""
    stride = x.stride()
    return (stride[0], stride[1], stride[2]) if len(stride) == 4 else (0, stride[1], stride[0])


def padded(size: int) -> int:
    """The power of two, at least 16, that holds `size`."""
    return max(16, 1 << (size - 1).bit_length())


def masks(c: Call) -> tuple[Tensor | None, ...]:
    """KEY_LENGTHS, QUERY_START, CU_Q, CU_K, SEED of the kernels."""
    return tuple(None if x is None else x.contiguous() for x in (c.key_lengths, c.query_start, c.cu_seqlens_q, c.cu_seqlens_k, c.dropout_seed))


def sizes(c: Call) -> Sizes:
    """Those of a call whose q, k and v have contiguous rows; made once for each set."""
    return _sizes(
        c.q.shape, c.v.shape, (*strides(c.q), *strides(c.k), *strides(c.v)), None if c.bias is None else (c.bias.shape, c.bias.stride()),
        None if c.cu_seqlens_q is None else c.cu_seqlens_q.shape[0] - 1, c.window_left, c.window_right, c.softcap, c.scale, c.dropout_p,
        c.q.dtype, c.q.device, _launch.float32_precision(),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _sizes(
    q: Sequence[int],
    v: Sequence[int],
    strides: tuple[int, ...],
    bias: tuple[Sequence[int], Sequence[int]] | None,
    sequences: int | None,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
) -> Sizes:
    packed = sequences is not None
    (rows, heads, d), (keys, kv_heads, dv) = (q, v) if packed else ((q[2], q[1], q[3]), (v[2], v[1], v[3]))
    steps = 0 if sequences is None else -(-(sequences + 1).bit_length() // 4) * 4  # a multiple of 4: few variants of a kernel
    factor, ceiling = (scale / softcap, softcap * math.log2(math.e)) if softcap > 0 else (scale * math.log2(math.e), 0.0)
    constants = {
        "D": d, "DV": dv, "D_PADDED": padded(d), "DV_PADDED": padded(dv), "EARLY": bias is not None or softcap > 0 or scale <= 0,
        "CAP": softcap > 0, "LEFT": left >= 0 or packed, "STEPS": steps, "PRECISION": precision,
    }  # fmt: skip
    numbers = (
        kv_heads, heads // kv_heads, rows, keys, sequences or 0, FAR if left < 0 else min(left, FAR), FAR if right < 0 else min(right, FAR),
        factor, ceiling, int(dropout_p * 2**32),
    )  # fmt: skip
    return Sizes(
        packed=packed,
        batch=1 if packed else q[0],
        kv_heads=kv_heads,
        group=heads // kv_heads,
        rows=rows,
        keys=keys,
        constants=constants,
        strides=strides,
        bias_strides=_bias_strides(bias),
        numbers=numbers,
        keep_scale=1.0 / (1.0 - dropout_p),
        dtype=dtype,
        device=device,
    )


def _bias_strides(bias: tuple[Sequence[int], Sequence[int]] | None) -> tuple[int, ...]:
    """[batch, heads, rows, keys], 0 where the bias is broadcast."""
    if bias is None:
        return 0, 0, 0, 0
    own = tuple(stride if size > 1 else 0 for size, stride in zip(*bias, strict=True))
    return (0,) * (4 - len(own)) + own
