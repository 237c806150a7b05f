"""`flash_attention_distill` and `attention_kl`, forward: the student's attention and its distance from the teacher's maps in one pass.

Limit. As `flash_attention`, with one more product and one more exponential a score and teacher head. With one teacher head to compare with,
its softmax is online too: beside sum and maximum a row keeps c = sum_j 2^(t_j - max) (t_j - s_j), and KL = c / sum - lse_t + lse_s; so the
teacher's scores are computed once. A mean of several maps has a logarithm of its own, for which the teacher's log-sum-exps are needed first
(`log_sums`), and KL = sum_j p_j (log p_j - s_j + lse_s), with p brought to a sum of 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.attention_masks import FAR, keys_of_rows, span
from cvmk.ops.triton.kernels.attention_scores import LN2, LOG2E, finite, load_rows, store_rows
from cvmk.ops.triton.kernels.common import cast, dot

VARYING = ("rows", "keys", "right")
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def mean_map(
    tq, tk, TQ, TK, T_LSE, query, inside, columns, read, seen, tq_h, tq_t, tk_h, tk_t, first_head, t_group, rows, t_factor,
    DT: tl.constexpr, DT_PADDED: tl.constexpr, TEACHERS: tl.constexpr, KEYS_FIRST: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The mean of the maps of TEACHERS heads from `first_head` on, [rows, keys] or (KEYS_FIRST) [keys, rows], from their log-sum-exps.

    tq, tk: the tiles of the one teacher head, or None, for which they are loaded here.
    """
    total = tl.zeros(seen.shape, tl.float32)
    for t in range(TEACHERS):
        head = first_head + t
        q, k = tq, tk
        if tq is None:
            q = load_rows(TQ + head * tq_h + query * tq_t, inside, DT, DT_PADDED, True)
        if tk is None:
            k = load_rows(TK + head // t_group * tk_h + columns.to(tl.int64) * tk_t, read, DT, DT_PADDED, MASKED)
        minus = finite(tl.load(T_LSE + head * rows + query, mask=inside, other=0.0) * LOG2E)
        if KEYS_FIRST:
            total += tl.exp2(dot(k, tl.trans(q), tl.zeros(seen.shape, tl.float32), PRECISION) * t_factor - minus[None, :])
        else:
            total += tl.exp2(dot(q, tl.trans(k), tl.zeros(seen.shape, tl.float32), PRECISION) * t_factor - minus[:, None])
    if MASKED:
        total = tl.where(seen, total, 0.0)
    return total * (1.0 / TEACHERS)


@triton.jit
def sum_up(
    total, top, q, K, first, last, end, high, k_t, factor,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the exponentials of the scores of the keys from `first` to `last` to the rows' sums."""
    block = tl.arange(0, BLOCK_N)
    for n in tl.range(first, last, BLOCK_N):
        columns = n + block
        k = load_rows(K + tl.cast(n, tl.int64) * k_t + block * k_t, columns < end, D, D_PADDED, MASKED)
        s = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32), PRECISION) * factor
        if MASKED:
            s = tl.where(columns[None, :] < high[:, None], s, float("-inf"))
        best = tl.maximum(top, tl.max(s, 1))
        minus = finite(best)
        total = total * tl.exp2(top - minus) + tl.sum(tl.exp2(s - minus[:, None]), 1)
        top = best
    return total, top


@triton.jit(do_not_specialize=VARYING)
def log_sums(
    Q, K, KEY_LENGTHS, LSE, q_b, q_h, q_t, k_b, k_h, k_t, heads, group, rows, keys, right, factor,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows x heads x batch items,). LSE [B, heads, rows]: the log-sum-exps of the scores."""
    tiles = tl.cdiv(rows, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b, head = pair // heads, pair % heads
    query = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    low, high = keys_of_rows(query, b, KEY_LENGTHS, None, None, None, rows, keys, 0, FAR, right, 0)
    start, _, stop, end = span(low, high, BLOCK_N)
    q = load_rows(Q + b * q_b + head * q_h + query.to(tl.int64) * q_t, query < rows, D, D_PADDED, True)
    K += b * k_b + head // group * k_h
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, top = sum_up(total, top, q, K, start, stop, end, high, k_t, factor, D, D_PADDED, BLOCK_N, False, PRECISION)
    total, top = sum_up(total, top, q, K, stop, end, end, high, k_t, factor, D, D_PADDED, BLOCK_N, True, PRECISION)
    empty = (low >= high) | (total == 0.0)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(LSE + pair * rows + query, lse, mask=query < rows)


@triton.jit
def attend(
    out, total, top, cross, t_total, t_top, q, tq, guess, K, V, TQ, TK, T_LSE, first, last, end, high, query, inside,
    k_t, v_t, tq_h, tq_t, tk_h, tk_t, first_head, t_group, rows, factor, t_factor,
    D: tl.constexpr, DV: tl.constexpr, DT: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, DT_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, TEACHERS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys from `first` to `last` to the rows' sums: the student's, and what its distance from the teacher needs."""
    block = tl.arange(0, BLOCK_N)
    for n in tl.range(first, last, BLOCK_N):
        columns = n + block
        read, seen = columns < end, columns[None, :] < high[:, None]
        k = load_rows(K + tl.cast(n, tl.int64) * k_t + block * k_t, read, D, D_PADDED, MASKED)
        s = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32), PRECISION) * factor
        if TEACHERS == 1:
            tk = load_rows(TK + tl.cast(n, tl.int64) * tk_t + block * tk_t, read, DT, DT_PADDED, MASKED)
            t = dot(tq, tl.trans(tk), tl.zeros((q.shape[0], BLOCK_N), tl.float32), PRECISION) * t_factor
            apart = t - s
            if MASKED:
                t = tl.where(seen, t, float("-inf"))
            best = tl.maximum(t_top, tl.max(t, 1))
            minus = finite(best)
            e, shrink = tl.exp2(t - minus[:, None]), tl.exp2(t_top - minus)
            t_total = t_total * shrink + tl.sum(e, 1)
            cross = cross * shrink + tl.sum(e * apart, 1)
            t_top = best
        else:
            target = mean_map(
                None, None, TQ, TK, T_LSE, query, inside, columns, read, seen, tq_h, tq_t, tk_h, tk_t, first_head, t_group, rows, t_factor,
                DT, DT_PADDED, TEACHERS, False, MASKED, PRECISION,
            )  # fmt: skip
            cross += tl.sum(target * (tl.log2(tl.maximum(target, TINY)) + guess[:, None] - s), 1)
            t_total += tl.sum(target, 1)
        if MASKED:
            s = tl.where(seen, s, float("-inf"))
        best = tl.maximum(top, tl.max(s, 1))
        minus = finite(best)
        p, shrink = tl.exp2(s - minus[:, None]), tl.exp2(top - minus)
        total = total * shrink + tl.sum(p, 1)
        if V is not None:
            v = load_rows(V + tl.cast(n, tl.int64) * v_t + block * v_t, read, DV, DV_PADDED, MASKED)
            out = dot(cast(p, v.dtype), v, out * shrink[:, None], PRECISION)
        top = best
    return out, total, top, cross, t_total, t_top


@triton.jit(do_not_specialize=VARYING)
def forward(
    Q, K, V, TQ, TK, KEY_LENGTHS, OUT, KL, LSE, T_LSE,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, tq_b, tq_h, tq_t, tk_b, tk_h, tk_t,
    heads, group, t_heads, t_group, together, rows, keys, right, factor, t_factor,
    D: tl.constexpr, DV: tl.constexpr, DT: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, DT_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TEACHERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows x heads x batch items,). `together` student heads share TEACHERS teacher heads. OUT is contiguous.

    T_LSE [B, t_heads, rows] is read where there are several teachers, else written. V and OUT may be None.
    """
    tiles = tl.cdiv(rows, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b, head = pair // heads, pair % heads
    first_head = head // together * TEACHERS
    query = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    low, high = keys_of_rows(query, b, KEY_LENGTHS, None, None, None, rows, keys, 0, FAR, right, 0)
    start, _, stop, end = span(low, high, BLOCK_N)
    inside, query = query < rows, query.to(tl.int64)
    K += b * k_b + head // group * k_h
    if V is not None:
        V += b * v_b + head // group * v_h
    TQ += b * tq_b
    TK += b * tk_b
    T_LSE += b * t_heads * rows
    q = load_rows(Q + b * q_b + head * q_h + query * q_t, inside, D, D_PADDED, True)
    tq, guess = None, None
    if TEACHERS > 1:
        # About the student's log-sum-exp: it goes into every term, so that large numbers do not cancel at the end.
        guess = finite(tl.load(T_LSE + first_head * rows + query, mask=inside, other=0.0)) * LOG2E
    else:
        tq = load_rows(TQ + first_head * tq_h + query * tq_t, inside, DT, DT_PADDED, True)
        TK += first_head // t_group * tk_h
    out = tl.zeros((BLOCK_M, DV_PADDED), tl.float32)
    total, cross, t_total = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    top, t_top = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    out, total, top, cross, t_total, t_top = attend(
        out, total, top, cross, t_total, t_top, q, tq, guess, K, V, TQ, TK, T_LSE, start, stop, end, high, query, inside,
        k_t, v_t, tq_h, tq_t, tk_h, tk_t, first_head, t_group, rows, factor, t_factor,
        D, DV, DT, D_PADDED, DV_PADDED, DT_PADDED, BLOCK_N, TEACHERS, False, PRECISION,
    )  # fmt: skip
    out, total, top, cross, t_total, t_top = attend(
        out, total, top, cross, t_total, t_top, q, tq, guess, K, V, TQ, TK, T_LSE, stop, end, end, high, query, inside,
        k_t, v_t, tq_h, tq_t, tk_h, tk_t, first_head, t_group, rows, factor, t_factor,
        D, DV, DT, D_PADDED, DV_PADDED, DT_PADDED, BLOCK_N, TEACHERS, True, PRECISION,
    )  # fmt: skip
    empty = (low >= high) | (total == 0.0)
    total = tl.where(empty, 1.0, total)
    lse = finite(top) + tl.log2(total)
    t_total = tl.where(empty | (t_total == 0.0), 1.0, t_total)
    if TEACHERS > 1:
        kl = cross / t_total - tl.log2(t_total) + (lse - guess)
    else:
        t_lse = finite(t_top) + tl.log2(t_total)
        kl = cross / t_total - (t_lse - lse)
        if head % together == 0:
            tl.store(T_LSE + first_head * rows + query, tl.where(empty, float("-inf"), t_lse * LN2), mask=inside)
    tl.store(KL + pair * rows + query, tl.where(empty, 0.0, kl * LN2), mask=inside)
    tl.store(LSE + pair * rows + query, tl.where(empty, float("-inf"), lse * LN2), mask=inside)
    if V is not None:
        out = tl.where(empty[:, None], 0.0, out / total[:, None])
        store_rows(OUT + (pair * rows + query) * DV, out, inside, DV, DV_PADDED)
