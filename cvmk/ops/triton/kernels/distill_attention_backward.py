"""`flash_attention_distill` and `attention_kl`, backward: as `flash_attention`, with w (P_s - P_t) added to the gradient of the scores.

With D' = D - (gradient of lse) - w, dS = P_s (dP - D') - w P_t: the distillation costs the teacher's map, one product and one exponential a
score and teacher head, in each of the two passes, and nothing else. The first pass, over tiles of rows, keeps D' for the second, over keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.attention_masks import FAR, keys_of_rows, rows_of_keys, span
from cvmk.ops.triton.kernels.attention_scores import LOG2E, finite, load_rows, store_rows
from cvmk.ops.triton.kernels.common import cast, dot
from cvmk.ops.triton.kernels.distill_attention_forward import VARYING, mean_map


@triton.jit
def gather(
    dq, q, grad, tq, minus, delta, weight, K, V, TQ, TK, T_LSE, first, last, end, high, query, inside,
    k_t, v_t, tq_h, tq_t, tk_h, tk_t, first_head, t_group, rows, factor, t_factor,
    D: tl.constexpr, DV: tl.constexpr, DT: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, DT_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, TEACHERS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `first` to `last` give to the rows' gradient (without the scale). grad, weight: None where there is none."""
    block = tl.arange(0, BLOCK_N)
    for n in tl.range(first, last, BLOCK_N):
        columns = n + block
        read, seen = columns < end, columns[None, :] < high[:, None]
        k = load_rows(K + tl.cast(n, tl.int64) * k_t + block * k_t, read, D, D_PADDED, MASKED)
        s = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32), PRECISION) * factor
        ds = 0.0 - delta[:, None]
        if grad is not None:
            v = load_rows(V + tl.cast(n, tl.int64) * v_t + block * v_t, read, DV, DV_PADDED, MASKED)
            ds = dot(grad, tl.trans(v), tl.zeros((q.shape[0], BLOCK_N), tl.float32), PRECISION) - delta[:, None]
        ds *= tl.exp2(s - minus[:, None])
        if weight is not None:
            ds -= weight[:, None] * mean_map(
                tq, None, TQ, TK, T_LSE, query, inside, columns, read, seen, tq_h, tq_t, tk_h, tk_t, first_head, t_group, rows, t_factor,
                DT, DT_PADDED, TEACHERS, False, MASKED, PRECISION,
            )  # fmt: skip
        if MASKED:
            ds = tl.where(seen, ds, 0.0)
        dq = dot(cast(ds, k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=VARYING)
def query_gradient(
    Q, K, V, TQ, TK, KEY_LENGTHS, OUT, LSE, T_LSE, GRAD, GRAD_KL, GRAD_LSE, DELTA, DQ,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, tq_b, tq_h, tq_t, tk_b, tk_h, tk_t, g_b, g_h, g_t,
    heads, group, t_heads, t_group, together, rows, keys, right, factor, t_factor, scale,
    D: tl.constexpr, DV: tl.constexpr, DT: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, DT_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TEACHERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows x heads x batch items,). Writes DELTA [B, heads, rows], and DQ (contiguous) unless it is None. OUT is contiguous."""
    tiles = tl.cdiv(rows, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b, head = pair // heads, pair % heads
    first_head = head // together * TEACHERS
    query = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    low, high = keys_of_rows(query, b, KEY_LENGTHS, None, None, None, rows, keys, 0, FAR, right, 0)
    start, _, stop, end = span(low, high, BLOCK_N)
    inside, query = query < rows, query.to(tl.int64)
    statistic = pair * rows + query
    delta = tl.zeros((BLOCK_M,), tl.float32)
    grad, weight, tq = None, None, None
    if GRAD is not None:
        grad = load_rows(GRAD + b * g_b + head * g_h + query * g_t, inside, DV, DV_PADDED, True)
        out = load_rows(OUT + statistic * DV, inside, DV, DV_PADDED, True)
        delta += tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if GRAD_LSE is not None:
        delta -= tl.load(GRAD_LSE + statistic, mask=inside, other=0.0)
    if GRAD_KL is not None:
        weight = tl.load(GRAD_KL + statistic, mask=inside, other=0.0)
        delta -= weight
    tl.store(DELTA + statistic, delta, mask=inside)
    if DQ is not None:
        K += b * k_b + head // group * k_h
        if V is not None:
            V += b * v_b + head // group * v_h
        TQ += b * tq_b
        TK += b * tk_b
        T_LSE += b * t_heads * rows
        minus = finite(tl.load(LSE + statistic, mask=inside, other=0.0) * LOG2E)
        q = load_rows(Q + b * q_b + head * q_h + query * q_t, inside, D, D_PADDED, True)
        if TEACHERS == 1 and GRAD_KL is not None:
            tq = load_rows(TQ + first_head * tq_h + query * tq_t, inside, DT, DT_PADDED, True)
        dq = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
        dq = gather(
            dq, q, grad, tq, minus, delta, weight, K, V, TQ, TK, T_LSE, start, stop, end, high, query, inside,
            k_t, v_t, tq_h, tq_t, tk_h, tk_t, first_head, t_group, rows, factor, t_factor,
            D, DV, DT, D_PADDED, DV_PADDED, DT_PADDED, BLOCK_N, TEACHERS, False, PRECISION,
        )  # fmt: skip
        dq = gather(
            dq, q, grad, tq, minus, delta, weight, K, V, TQ, TK, T_LSE, stop, end, end, high, query, inside,
            k_t, v_t, tq_h, tq_t, tk_h, tk_t, first_head, t_group, rows, factor, t_factor,
            D, DV, DT, D_PADDED, DV_PADDED, DT_PADDED, BLOCK_N, TEACHERS, True, PRECISION,
        )  # fmt: skip
        store_rows(DQ + statistic * D, tl.where((low < high)[:, None], dq * scale, 0.0), inside, D, D_PADDED)


@triton.jit
def scatter(
    dk, dv, k, v, tk, Q, TQ, TK, LSE, T_LSE, GRAD, GRAD_KL, DELTA, first, last, end, low, high, columns, alive,
    q_t, tq_h, tq_t, tk_h, tk_t, g_t, first_head, t_group, rows, factor, t_factor,
    D: tl.constexpr, DV: tl.constexpr, DT: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, DT_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, TEACHERS: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one head's rows from `first` to `last` give to the gradients of keys (without the scale) and values."""
    block = tl.arange(0, BLOCK_M)
    for m in tl.range(first, last, BLOCK_M):
        row = m + block
        inside, query = row < end, row.to(tl.int64)
        seen = (row[None, :] >= low[:, None]) & (row[None, :] < high[:, None])
        q = load_rows(Q + query * q_t, inside, D, D_PADDED, MASKED)
        minus = finite(tl.load(LSE + query, mask=inside, other=0.0) * LOG2E)
        s = dot(k, tl.trans(q), tl.zeros((k.shape[0], BLOCK_M), tl.float32), PRECISION) * factor
        p = tl.exp2(s - minus[None, :])
        if MASKED:
            p = tl.where(seen, p, 0.0)
        if GRAD is not None:
            grad = load_rows(GRAD + query * g_t, inside, DV, DV_PADDED, MASKED)
            if WANT_V:
                dv = dot(cast(p, grad.dtype), grad, dv, PRECISION)
        if WANT_K:
            ds = 0.0 - tl.load(DELTA + query, mask=inside, other=0.0)[None, :]
            if GRAD is not None:
                ds += dot(v, tl.trans(grad), tl.zeros((k.shape[0], BLOCK_M), tl.float32), PRECISION)
            ds *= p
            if GRAD_KL is not None:
                weight = tl.load(GRAD_KL + query, mask=inside, other=0.0)
                ds -= weight[None, :] * mean_map(
                    None, tk, TQ, TK, T_LSE, query, inside, columns, alive, seen, tq_h, tq_t, tk_h, tk_t, first_head, t_group, rows, t_factor,
                    DT, DT_PADDED, TEACHERS, True, True, PRECISION,
                )  # fmt: skip
            if MASKED:
                ds = tl.where(seen, ds, 0.0)
            dk = dot(cast(ds, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def key_gradient(
    Q, K, V, TQ, TK, KEY_LENGTHS, LSE, T_LSE, GRAD, GRAD_KL, DELTA, DK, DV_OUT,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, tq_b, tq_h, tq_t, tk_b, tk_h, tk_t, g_b, g_h, g_t,
    heads, group, t_heads, t_group, together, rows, keys, right, factor, t_factor, scale,
    D: tl.constexpr, DV: tl.constexpr, DT: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, DT_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TEACHERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of keys x heads of keys x batch items,). DK and DV_OUT are contiguous and may be None."""
    tiles = tl.cdiv(keys, BLOCK_N)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b, kv_head = pair // (heads // group), pair % (heads // group)
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    low, high = rows_of_keys(columns, b, KEY_LENGTHS, None, None, None, rows, keys, 0, FAR, right, 0)
    alive = low < high
    start, middle, stop, end = span(low, high, BLOCK_M)
    at = columns.to(tl.int64)
    k = load_rows(K + b * k_b + kv_head * k_h + at * k_t, alive, D, D_PADDED, True)
    v = None
    if GRAD is not None:
        v = load_rows(V + b * v_b + kv_head * v_h + at * v_t, alive, DV, DV_PADDED, True)
    TQ += b * tq_b
    TK += b * tk_b
    T_LSE += b * t_heads * rows
    dk, dv = tl.zeros((BLOCK_N, D_PADDED), tl.float32), tl.zeros((BLOCK_N, DV_PADDED), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        first_head = head // together * TEACHERS
        statistic = (b * heads + head) * rows
        grad_at, weight_at, tk = None, None, None
        if GRAD is not None:
            grad_at = GRAD + b * g_b + head * g_h
        if GRAD_KL is not None:
            weight_at = GRAD_KL + statistic
            if TEACHERS == 1:
                tk = load_rows(TK + first_head // t_group * tk_h + at * tk_t, alive, DT, DT_PADDED, True)
        dk, dv = scatter(
            dk, dv, k, v, tk, Q + b * q_b + head * q_h, TQ, TK, LSE + statistic, T_LSE, grad_at, weight_at, DELTA + statistic,
            start, middle, end, low, high, columns, alive, q_t, tq_h, tq_t, tk_h, tk_t, g_t, first_head, t_group, rows, factor, t_factor,
            D, DV, DT, D_PADDED, DV_PADDED, DT_PADDED, BLOCK_M, TEACHERS, DK is not None, DV_OUT is not None, True, PRECISION,
        )  # fmt: skip
        dk, dv = scatter(
            dk, dv, k, v, tk, Q + b * q_b + head * q_h, TQ, TK, LSE + statistic, T_LSE, grad_at, weight_at, DELTA + statistic,
            middle, stop, end, low, high, columns, alive, q_t, tq_h, tq_t, tk_h, tk_t, g_t, first_head, t_group, rows, factor, t_factor,
            D, DV, DT, D_PADDED, DV_PADDED, DT_PADDED, BLOCK_M, TEACHERS, DK is not None, DV_OUT is not None, False, PRECISION,
        )  # fmt: skip
        dk, dv = scatter(
            dk, dv, k, v, tk, Q + b * q_b + head * q_h, TQ, TK, LSE + statistic, T_LSE, grad_at, weight_at, DELTA + statistic,
            stop, end, end, low, high, columns, alive, q_t, tq_h, tq_t, tk_h, tk_t, g_t, first_head, t_group, rows, factor, t_factor,
            D, DV, DT, D_PADDED, DV_PADDED, DT_PADDED, BLOCK_M, TEACHERS, DK is not None, DV_OUT is not None, True, PRECISION,
        )  # fmt: skip
    inside = columns < keys
    if DK is not None:
        store_rows(DK + (pair * keys + at) * D, tl.where(alive[:, None], dk * scale, 0.0), inside, D, D_PADDED)
    if DV_OUT is not None:
        store_rows(DV_OUT + (pair * keys + at) * DV, tl.where(alive[:, None], dv, 0.0), inside, DV, DV_PADDED)
