"""The gradient of a bias that is broadcast: scores and their gradients once more, added up where the bias has one number for several.

Limit. Two products a score and one number a bias element written. A program owns a tile of the bias and goes through its share of what the
tile was broadcast to (batch items, heads, tiles of rows) in order; where there are too few tiles to fill the chip, several programs share
one and write sums of their own, which are then added in order: no atomics, the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.attention_backward import VARYING, score_gradients
from cvmk.ops.triton.kernels.attention_masks import keys_of_rows, span
from cvmk.ops.triton.kernels.attention_scores import LOG2E, finite, is_coarse, load_rows, power, scores
from cvmk.ops.triton.kernels.common import dot
from cvmk.ops.triton.kernels.dropout import column_words, dropout_key, kept, row_words


@triton.jit(do_not_specialize=(*VARYING, "units", "share"))
def bias_gradient(
    Q, K, V, BIAS, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, SEED, GRAD, LSE, DELTA, DBIAS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, bias_b, bias_h, bias_i, bias_j,
    kv_heads, group, rows, keys, sequences, left, right, factor, ceiling, threshold, keep_scale, own_batch, own_heads, own_tiles, all_heads, all_tiles,
    units, share,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, LEFT: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of keys x own_tiles x own_heads x own_batch, shares). DBIAS [shares, own_batch, own_heads, rows or 1, keys] float32.

    The bias has own_batch, own_heads and own_tiles (tiles of rows); a unit is one of the all_tiles x all_heads x batch items, `units` in
    all, that a tile of the bias was broadcast to. ROWS: the bias has rows of its own.
    """
    tiles = tl.cdiv(keys, BLOCK_N)
    which = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    own_tile, own_head, own_item = which % own_tiles, which // own_tiles % own_heads, which // own_tiles // own_heads
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = tl.program_id(1) * share
    for unit in range(begin, tl.minimum(begin + share, units)):
        tile = own_tile + unit % all_tiles
        head = (own_head + unit // all_tiles % all_heads).to(tl.int64)
        b = (own_item + unit // all_tiles // all_heads).to(tl.int64)
        query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = query < rows
        low, high = keys_of_rows(query, b, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, rows, keys, sequences, left, right, STEPS)
        start, _, _, end = span(low, high, BLOCK_N)
        row, at = query.to(tl.int64), columns.to(tl.int64)
        if (tl.min(columns) < end) & (tl.max(columns) >= start):
            statistic = (b * kv_heads * group + head) * rows + row
            lse = tl.load(LSE + statistic, mask=inside, other=0.0)
            seen = (columns[None, :] < tl.where(is_coarse(lse), low, high)[:, None]) & (columns[None, :] >= low[:, None])
            q = load_rows(Q + b * q_b + head * q_h + row * q_t, inside, D, D_PADDED, True)
            grad = load_rows(GRAD + b * g_b + head * g_h + row * g_t, inside, DV, DV_PADDED, True)
            k = load_rows(K + b * k_b + head // group * k_h + at * k_t, columns < end, D, D_PADDED, True)
            v = load_rows(V + b * v_b + head // group * v_h + at * v_t, columns < end, DV, DV_PADDED, True)
            minus = finite(lse * LOG2E)
            delta = tl.load(DELTA + statistic, mask=inside, other=0.0)
            bias_at = BIAS + b * bias_b + head * bias_h + (row * bias_i)[:, None] + (at * bias_j)[None, :]
            s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            s, slope = scores(s, bias_at, seen, factor, ceiling, EARLY, CAP, True)
            p = power(s, minus[:, None], factor, EARLY)
            dp = dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            keep = None
            if SEED is not None:
                key = dropout_key(SEED)
                words = row_words(key, b, kv_heads * group, tl.zeros((BLOCK_M,), tl.int64) + head, row)
                keep = kept(words[:, None], column_words(key, columns)[None, :], threshold)
            ds, dx = score_gradients(p, dp, delta[:, None], seen, slope, keep, keep_scale, CAP, SEED is not None, True)
            sums += ds
    matrix = (tl.program_id(1) * own_batch + own_item).to(tl.int64) * own_heads + own_head
    if ROWS:
        own = own_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(DBIAS + (matrix * rows + own)[:, None] * keys + columns[None, :], sums, mask=(own < rows)[:, None] & (columns < keys)[None, :])
    else:
        tl.store(DBIAS + matrix * keys + columns, tl.sum(sums, 0), mask=columns < keys)
