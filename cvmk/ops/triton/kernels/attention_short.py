"""`flash_attention`, backward, of sequences that are one tile: everything in one launch and one pass.

Limit. Bytes and launches: q, k, v and dO are read once, three gradients written once, at 64 x 64 x 64 in bfloat16 56 KB a head against
2.6 MFLOP. The tile holds whole rows, so that D_i = sum_j P_ij dP_ij comes from the probabilities: neither the output is read nor
anything kept between launches. Programs are small (64 x 64, four warps), several to a multiprocessor, to hide each other's latency.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.attention_backward import VARYING
from cvmk.ops.triton.kernels.attention_masks import keys_of_rows
from cvmk.ops.triton.kernels.attention_scores import LOG2E, finite, is_coarse, load_rows, power, scores, store_rows
from cvmk.ops.triton.kernels.common import cast, dot
from cvmk.ops.triton.kernels.dropout import column_words, dropout_key, kept, row_words


@triton.jit(do_not_specialize=VARYING)
def short_backward(
    Q, K, V, BIAS, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, SEED, GRAD, LSE, GRAD_LSE, DELTA, DQ, DK, DV_OUT,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, bias_b, bias_h, bias_i, bias_j,
    kv_heads, group, rows, keys, sequences, left, right, factor, ceiling, threshold, keep_scale, scale,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, LEFT: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (batch items times key heads,); rows * group <= BLOCK_M, keys <= BLOCK_N. Gradients are contiguous; DELTA, DQ, DK, DV_OUT may be None."""
    pair = tl.program_id(0).to(tl.int64)
    b, kv_head = pair // kv_heads, pair % kv_heads
    r, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    query, head = r // group, kv_head * group + r % group
    low, high = keys_of_rows(query, b, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, rows, keys, sequences, left, right, STEPS)
    inside, statistic = query < rows, (b * kv_heads * group + head) * rows + query
    lse = tl.load(LSE + statistic, mask=inside, other=0.0)
    if BIAS is not None:
        high = tl.where(is_coarse(lse), low, high)
        lse = tl.where(is_coarse(lse), 0.0, lse)
    seen = (columns[None, :] < high[:, None]) & (columns[None, :] >= low[:, None])
    read = columns < tl.max(high)
    alive = low < high  # other rows are not read: products over rows would carry their NaN to every key
    query = query.to(tl.int64)
    q = load_rows(Q + b * q_b + head * q_h + query * q_t, alive, D, D_PADDED, True)
    k = load_rows(K + b * k_b + kv_head * k_h + columns * k_t, read, D, D_PADDED, True)
    v = load_rows(V + b * v_b + kv_head * v_h + columns * v_t, read, DV, DV_PADDED, True)
    grad = load_rows(GRAD + b * g_b + head * g_h + query * g_t, alive, DV, DV_PADDED, True)
    minus = finite(lse * LOG2E)
    bias_at = None
    if BIAS is not None:
        bias_at = BIAS + b * bias_b + (head * bias_h + query * bias_i)[:, None] + (columns * bias_j)[None, :]
    s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
    s, slope = scores(s, bias_at, seen, factor, ceiling, EARLY, CAP, True)
    p = power(s, minus[:, None], factor, EARLY)
    dp = dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
    dropped = p
    if SEED is not None:
        key = dropout_key(SEED)
        keep = kept(row_words(key, b, kv_heads * group, head, query)[:, None], column_words(key, columns)[None, :], threshold)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    delta = tl.sum(p * dp, 1)
    if GRAD_LSE is not None:
        delta -= tl.load(GRAD_LSE + statistic, mask=inside, other=0.0)
    if DELTA is not None:
        tl.store(DELTA + statistic, delta, mask=inside)
    ds = tl.where(seen, p * (dp - delta[:, None]), 0.0)
    if CAP:
        ds *= 1.0 - slope * slope
    ds = cast(ds, q.dtype)
    if DQ is not None:
        dq = dot(ds, k, tl.zeros((BLOCK_M, D_PADDED), tl.float32), PRECISION)
        store_rows(DQ + statistic * D, dq * scale, inside, D, D_PADDED)
    at = pair * keys + columns
    if DK is not None:
        dk = dot(tl.trans(ds), q, tl.zeros((BLOCK_N, D_PADDED), tl.float32), PRECISION)
        store_rows(DK + at * D, dk * scale, columns < keys, D, D_PADDED)
    if DV_OUT is not None:
        dv = dot(tl.trans(cast(dropped, grad.dtype)), grad, tl.zeros((BLOCK_N, DV_PADDED), tl.float32), PRECISION)
        store_rows(DV_OUT + at * DV, dv, columns < keys, DV, DV_PADDED)
