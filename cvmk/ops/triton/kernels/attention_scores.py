"""From products to scores and probabilities: scale, soft cap, bias and dropout of `cvmk.ops.flash_attention`.

Scores are held times log2(e), probabilities are powers of two. Where neither cap nor bias comes between (and the scale is positive), the
products stay as they are and `factor`, scale times log2(e), goes into one multiply-add per score with the number that is subtracted.
The same functions serve tiles [rows, keys] and [keys, rows]: what belongs to rows and keys comes as tensors that broadcast to the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.common import cast

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(pointers, inside, SIZE: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """[n, PADDED]: the rows of SIZE numbers that `pointers` [n] show, zeros behind them and, where MASKED, for rows that are not `inside`."""
    columns = tl.arange(0, PADDED)
    at = pointers[:, None] + columns[None, :]
    if MASKED and SIZE == PADDED:
        loaded = tl.load(at, mask=inside[:, None], other=0.0)
    elif MASKED:
        loaded = tl.load(at, mask=inside[:, None] & (columns[None, :] < SIZE), other=0.0)
    elif SIZE == PADDED:
        loaded = tl.load(at)
    else:
        loaded = tl.load(at, mask=columns[None, :] < SIZE, other=0.0)
    return loaded


@triton.jit
def store_rows(pointers, values, inside, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """The first SIZE columns of `values` [n, PADDED] in the pointers' dtype, for the rows that are `inside`."""
    columns = tl.arange(0, PADDED)
    tl.store(pointers[:, None] + columns[None, :], cast(values, pointers.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < SIZE))


@triton.jit
def tanh(x):
    """Five terms of the series where 1 - 2 / (e^2x + 1) would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0)))))
    return tl.where(square < 0.0625, series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def scores(products, bias_at, seen, factor, ceiling, EARLY: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr):
    """Masked scores (still to be multiplied by `factor` unless EARLY), and the cap's tanh where there is one.

    bias_at: pointers to the bias of each score, or None. factor: scale log2(e), with a soft cap c scale / c; ceiling: c log2(e).
    """
    slope = products
    if CAP:
        slope = tanh(products * factor)
        products = slope * ceiling
    elif EARLY:
        products = products * factor
    if bias_at is not None:
        if MASKED:
            products += tl.load(bias_at, mask=seen, other=0.0).to(tl.float32) * LOG2E
        else:
            products += tl.load(bias_at).to(tl.float32) * LOG2E
    if MASKED:
        products = tl.where(seen, products, float("-inf"))
    return products, slope


@triton.jit
def power(products, minus, factor, EARLY: tl.constexpr):
    """2^(score - minus) of what `scores` returned."""
    if EARLY:
        raised = products - minus
    else:
        raised = products * factor - minus
    return tl.exp2(raised)


@triton.jit
def finite(x):
    """0 for -inf: the maximum or log-sum-exp of a row that sees nothing, which is subtracted from -inf."""
    return tl.where(x == float("-inf"), 0.0, x)


# -- coarse rows: a bias moves their scores so far from 0 that float32 has no digits for them ------------------------------------------
COARSE = tl.constexpr(256.0)  # a score is rounded to 2e-5 there, and probabilities by as much


@triton.jit
def is_coarse(lse):
    """Which rows with a bias the kernels of attention_coarse.py do, by their log-sum-exps; NaN counts, and -inf in a row that sees nothing does not."""
    return ~((lse > -COARSE) & (lse < COARSE)) & (lse != float("-inf"))
