"""Residual sum, dropout and norm of rows: tiles [R, N] of whole rows.

`residual_forward`, one program a tile, reads x and branch and writes sum and norm. `residual_backward` reads the sum again with both gradients and
writes those of x and branch; a program goes over every P-th tile and keeps its part of the gradients of weight and bias, so that their sums have one order
for one device. Limit, bfloat16 rows of n: 8 n bytes forward, 10 n bytes backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.common import cast
from cvmk.ops.triton.kernels.dropout import drop, row_hashes


@triton.jit(do_not_specialize=["rows", "threshold"])
def residual_forward(
    X, BRANCH, WEIGHT, BIAS, SEED, SUM, NORMED, STATS, rows, n, eps, keep_factor, threshold, RMS: tl.constexpr, R: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    at, columns = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, N)
    inside = (at < rows)[:, None] & (columns < n)[None, :]
    where = at.to(tl.int64)[:, None] * n + columns[None, :]
    x = tl.load(X + where, mask=inside, other=0.0).to(tl.float32)
    if BRANCH is not None:
        branch = tl.load(BRANCH + where, mask=inside, other=0.0).to(tl.float32)
        if SEED is not None:
            branch = drop(branch, SEED, row_hashes(SEED, at), columns, keep_factor, threshold)
        total = cast(x + branch, SUM.dtype.element_ty)
        tl.store(SUM + where, total, mask=inside)
        x = total.to(tl.float32)
    mean = tl.zeros([R], tl.float32) if RMS else tl.sum(x, 1) / n
    centred = tl.where((columns < n)[None, :], x - mean[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / n + eps)
    if STATS is not None:
        tl.store(STATS + at, mean, mask=at < rows)
        tl.store(STATS + rows + at, factor, mask=at < rows)
    y = centred * factor[:, None] * tl.load(WEIGHT + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tl.store(NORMED + where, cast(y, NORMED.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "threshold"])
def residual_backward(
    SUM, STATS, WEIGHT, SEED, GRAD_SUM, GRAD_NORMED, DX, DBRANCH, PARTS, rows, n, keep_factor, threshold,
    RMS: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """PARTS [2, programs, n]: what each program adds to the gradients of weight and bias."""
    program, programs, columns = tl.program_id(0), tl.num_programs(0), tl.arange(0, N)
    weight = tl.load(WEIGHT + columns, mask=columns < n, other=0.0).to(tl.float32)
    weight_sum, bias_sum = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for first in range(program * R, rows, programs * R):
        at = first + tl.arange(0, R)
        inside = (at < rows)[:, None] & (columns < n)[None, :]
        where = at.to(tl.int64)[:, None] * n + columns[None, :]
        mean = tl.load(STATS + at, mask=at < rows, other=0.0)
        factor = tl.load(STATS + rows + at, mask=at < rows, other=0.0)[:, None]
        x = tl.where(inside, (tl.load(SUM + where, mask=inside, other=0.0).to(tl.float32) - mean[:, None]) * factor, 0.0)
        grad = tl.load(GRAD_NORMED + where, mask=inside, other=0.0).to(tl.float32)
        weight_sum += tl.sum(grad * x, 0)
        bias_sum += tl.sum(grad, 0)
        g = grad * weight[None, :]
        d = g - x * (tl.sum(g * x, 1) / n)[:, None]
        if not RMS:
            d -= (tl.sum(g, 1) / n)[:, None]
        d *= factor
        if GRAD_SUM is not None:
            d += tl.load(GRAD_SUM + where, mask=inside, other=0.0).to(tl.float32)
        if DX is not None:
            tl.store(DX + where, cast(d, DX.dtype.element_ty), mask=inside)
        if DBRANCH is not None:
            if SEED is not None:
                d = drop(d, SEED, row_hashes(SEED, at), columns, keep_factor, threshold)
            tl.store(DBRANCH + where, cast(d, DBRANCH.dtype.element_ty), mask=inside)
    part = PARTS + program.to(tl.int64) * n + columns
    tl.store(part, weight_sum, mask=columns < n)
    tl.store(part + programs.to(tl.int64) * n, bias_sum, mask=columns < n)
