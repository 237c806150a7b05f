"""`int4_linear`: a weight of 4 bits becomes numbers of x's type in registers, a tile at a time, and goes to the tensor cores.

Few rows are bound by the weight's N K / 2 bytes, which are read once: programs share the inputs between them as well as the outputs, so
that all multiprocessors read; their sums are added by a second launch, in the order of the splits. Many rows are bound by the
tensor cores; what is dequantised is then used for BLOCK_M rows. The layout "triton_int4" makes bytes of 2 inputs that are 64 apart: a tile of
bytes gives two tiles of neighbouring inputs, without moving nibbles between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.activations import activate, tile_of
from cvmk.ops.triton.kernels.common import dot

BLOCK: tl.constexpr = tl.constexpr(128)
HALF: tl.constexpr = tl.constexpr(64)
FLOAT_BITS: tl.constexpr = tl.constexpr(0x4B000000)  # 2^23 in float32


@triton.jit
def of_groups(pointer, first, n, N, K, inside, GROUP_SIZE: tl.constexpr):
    """Of the inputs first ... first + 63 the scales or zeros [BLOCK_N, groups, 1] in float32; they lie as [K / GROUP_SIZE, N]."""
    group = tl.arange(0, HALF // GROUP_SIZE if GROUP_SIZE < HALF else 1) + first // GROUP_SIZE
    mask = inside[:, None] & (group * GROUP_SIZE < K)[None, :]
    return tl.load(pointer + group.to(tl.int64)[None, :] * N + n[:, None], mask=mask, other=0).to(tl.float32)[:, :, None]


@triton.jit
def dequantised(codes, scales, zeros, first, n, N, K, inside, BLOCK_N: tl.constexpr, GROUP_SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """(codes - zero) * scale [BLOCK_N, 64] of the inputs first ... first + 63."""
    GROUPS: tl.constexpr = HALF // GROUP_SIZE if GROUP_SIZE < HALF else 1
    # The code as the last bits of 2^23 is the number 2^23 + code: two plain instructions, where a conversion takes as long as eight.
    grouped = tl.reshape((codes | FLOAT_BITS).to(tl.float32, bitcast=True), (BLOCK_N, GROUPS, HALF // GROUPS))
    zero = 8.0 if zeros is None else of_groups(zeros, first, n, N, K, inside, GROUP_SIZE)
    w = (grouped - (8388608.0 + zero)) * of_groups(scales, first, n, N, K, inside, GROUP_SIZE)
    return tl.reshape(w, (BLOCK_N, HALF)).to(DTYPE)


@triton.jit
def multiplied(
    x, stride, weight, scales, zeros, m, n, M, N, K, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [M, K] times the weight over the blocks of 128 inputs from `first` up to `last`: [BLOCK_M, BLOCK_N] in float32.

    The weight is the left operand: tensor cores take that one from registers, where it was dequantised, and few rows are enough for the
    right one.
    """
    there, inside = m < M, n < N
    columns = x + m.to(tl.int64)[None, :] * stride
    half = tl.arange(0, HALF)
    rows = weight + n.to(tl.int64)[:, None] * (tl.cdiv(K, BLOCK) * HALF)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, last):
        codes = tl.load(rows + (half + block * HALF)[None, :], mask=inside[:, None], other=0).to(tl.int32)
        low, high = block * BLOCK, block * BLOCK + HALF
        a = tl.load(columns + (half + low)[:, None], mask=(half + low < K)[:, None] & there[None, :], other=0.0)
        b = tl.load(columns + (half + high)[:, None], mask=(half + high < K)[:, None] & there[None, :], other=0.0)
        w = dequantised(codes & 15, scales, zeros, low, n, N, K, inside, BLOCK_N, GROUP_SIZE, x.dtype.element_ty)
        sums = dot(w, a, sums, PRECISION)
        w = dequantised(codes >> 4, scales, zeros, high, n, N, K, inside, BLOCK_N, GROUP_SIZE, x.dtype.element_ty)
        sums = dot(w, b, sums, PRECISION)
    return tl.trans(sums)


@triton.jit
def with_bias(y, bias, n, N):
    if bias is None:
        return y
    else:
        return y + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def product(
    x, weight, scales, zeros, bias, out, M, N, K, stride,
    ACTIVATION: tl.constexpr, GROUP_SIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [M, N], or [M, N / 2] of swiglu. N: outputs of the weight."""
    columns = N // 2 if ACTIVATION == "swiglu" else N
    block_m, block_n = tile_of(tl.cdiv(M, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    m, n = block_m * BLOCK_M + tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    blocks = tl.cdiv(K, BLOCK)
    y = multiplied(x, stride, weight, scales, zeros, m, n, M, N, K, 0, blocks, BLOCK_M, BLOCK_N, GROUP_SIZE, PRECISION)
    y = with_bias(y, bias, n, N)
    if ACTIVATION == "swiglu":
        up = multiplied(x, stride, weight, scales, zeros, m, n + columns, M, N, K, 0, blocks, BLOCK_M, BLOCK_N, GROUP_SIZE, PRECISION)
        y = activate(y, "silu") * with_bias(up, bias, n + columns, N)
    else:
        y = activate(y, ACTIVATION)
    at = out + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < columns)[None, :])


@triton.jit
def split_product(
    x, weight, scales, zeros, partial, M, N, K, stride, share,
    GROUP_SIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial [splits, M, N] in float32: split s sums the inputs of `share` blocks of 128. M is at most BLOCK_M."""
    split = tl.program_id(1)
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    last = tl.minimum((split + 1) * share, tl.cdiv(K, BLOCK))
    sums = multiplied(x, stride, weight, scales, zeros, m, n, M, N, K, split * share, last, BLOCK_M, BLOCK_N, GROUP_SIZE, PRECISION)
    tl.store(partial + (split * M + m)[:, None] * N + n[None, :], sums, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def added(partial, row, n, M, N, splits, inside, BLOCK_N: tl.constexpr):
    y = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(splits):
        y += tl.load(partial + (split * M + row) * N + n, mask=inside, other=0.0)
    return y[None, :]


@triton.jit
def add_splits(partial, bias, out, M, N, splits, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
    """out [M, N] (swiglu: [M, N / 2]) of the sums over splits, a row and BLOCK_N outputs a program."""
    columns = N // 2 if ACTIVATION == "swiglu" else N
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < columns
    y = with_bias(added(partial, row, n, M, N, splits, inside, BLOCK_N), bias, n, N)
    if ACTIVATION == "swiglu":
        y = activate(y, "silu") * with_bias(added(partial, row, n + columns, M, N, splits, inside, BLOCK_N), bias, n + columns, N)
    else:
        y = activate(y, ACTIVATION)
    tl.store(out + row * columns + n[None, :], y.to(out.dtype.element_ty), mask=inside[None, :])
