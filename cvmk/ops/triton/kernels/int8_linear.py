"""`int8_linear`: rows quantised, multiplied by int8 tensor cores with int32 sums, scaled and finished.

Few rows are bound by the weight's N K bytes: one launch, in which every program finds its rows' maxima and quantises them again (the rows
come from the second-level cache), so that the weight is the only thing read from memory. Many rows are bound by the tensor cores
(1979 TOP/s): the rows are quantised once, and an ordinary product follows with the epilogue in registers. The integers are the same in
both, and the float steps of the law are separate operations (launches switch contraction off), so a row's result depends on nothing else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.activations import activate, tile_of

SMALLEST: tl.constexpr = tl.constexpr(2.0**-100)
ROUNDING: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to integers, ties to even


@triton.jit
def smoothed(x, smooth, k, inside, mask):
    """x / smooth in float32 at rows x (pointers [BLOCK_M, 1]) and inputs k [BLOCK_K]."""
    u = tl.load(x + k[None, :], mask=mask, other=0.0).to(tl.float32)
    if smooth is not None:
        u *= tl.div_rn(1.0, tl.load(smooth + k, mask=inside, other=1.0).to(tl.float32))[None, :]
    return u


@triton.jit
def row_maximum(x, smooth, there, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """max(|u|, 2^-100) [BLOCK_M]; infinity for a row with a NaN."""
    found = tl.full((BLOCK_M, BLOCK_K), SMALLEST, tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        u = tl.abs(smoothed(x, smooth, k, k < K, there[:, None] & (k < K)[None, :]))
        found = tl.maximum(found, tl.where(u != u, float("inf"), u))
    return tl.max(found, 1)


@triton.jit
def quantised(u, factor):
    """clamp(round_half_even(u * factor)) as int8; what is not finite gives 0."""
    v = u * factor
    v = tl.minimum(tl.maximum((v + ROUNDING) - ROUNDING, -127.0), 127.0)
    return tl.where(u * factor == u * factor, v, 0.0).to(tl.int32).to(tl.int8)


@triton.jit
def finish(sums, maximum, scales, bias, n, inside, K):
    """The pre-activation of int32 sums [BLOCK_M, BLOCK_N]."""
    y = sums.to(tl.float32) * tl.div_rn(maximum, tl.full(maximum.shape, 127.0, tl.float32))[:, None]
    y = y * tl.load(scales + n, mask=inside, other=0.0)[None, :]
    if bias is not None:
        y = y + tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def quantise_rows(x, smooth, values, maxima, K, stride, stride_q, BLOCK_K: tl.constexpr):
    """values [M, stride_q] int8, zeros behind K, and the rows' maxima [M], one row a program."""
    row = tl.program_id(0).to(tl.int64)
    there = tl.full((1,), True, tl.int1)
    rows = x + row * stride + tl.zeros((1, 1), tl.int64)
    maximum = row_maximum(rows, smooth, there, K, 1, BLOCK_K)
    factor = tl.div_rn(tl.full((1,), 127.0, tl.float32), maximum)[:, None]
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        u = smoothed(rows, smooth, k, k < K, (k < K)[None, :])
        tl.store(values + row * stride_q + k[None, :], quantised(u, factor), mask=(k < stride_q)[None, :])
    tl.store(maxima + row + tl.arange(0, 1), maximum)


@triton.jit
def product(
    x, smooth, maxima, weight, scales, bias, out, M, N, K, stride, stride_w,
    ACTIVATION: tl.constexpr, QUANTISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [M, N]. x [M, stride] is quantised here (QUANTISE) or is int8 with its maxima; weight int8 [N, stride_w], zeros behind K, of swiglu
    [2 N, stride_w].
    """
    block_m, block_n = tile_of(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m, n = block_m * BLOCK_M + tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    there, inside = m < M, n < N
    rows, columns = x + m.to(tl.int64)[:, None] * stride, weight + n.to(tl.int64)[None, :] * stride_w
    if QUANTISE:
        maximum = row_maximum(rows, smooth, there, K, BLOCK_M, BLOCK_K)
        factor = tl.div_rn(tl.full((BLOCK_M,), 127.0, tl.float32), maximum)[:, None]
    else:
        maximum = tl.load(maxima + m, mask=there, other=1.0)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if ACTIVATION == "swiglu":
        up_columns = columns + tl.cast(N, tl.int64) * stride_w
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if QUANTISE:
            q = quantised(smoothed(rows, smooth, k, k < K, there[:, None] & (k < K)[None, :]), factor)
        else:
            q = tl.load(rows + k[None, :], mask=there[:, None] & (k < stride)[None, :], other=0)
        of_weight = (k < stride_w)[:, None] & inside[None, :]
        sums = tl.dot(q, tl.load(columns + k[:, None], mask=of_weight, other=0), sums, out_dtype=tl.int32)
        if ACTIVATION == "swiglu":
            up = tl.dot(q, tl.load(up_columns + k[:, None], mask=of_weight, other=0), up, out_dtype=tl.int32)
    y = finish(sums, maximum, scales, bias, n, inside, K)
    if ACTIVATION == "swiglu":
        y = activate(y, "silu") * finish(up, maximum, scales, bias, n + N, inside, K)
    else:
        y = activate(y, ACTIVATION)
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])
