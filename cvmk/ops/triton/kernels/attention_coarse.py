"""`flash_attention`, coarse rows: a bias moves their scores so far from 0 that float32 has no digits for them (masks of finite numbers).

The other kernels leave such rows out, or write what these write anew after them. Products are in float32 as there; the bias is added, and the
row's maximum subtracted, in float64, which is one addition a score. Programs whose rows are not coarse, known by the log-sum-exps, end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.attention_backward import VARYING, score_gradients
from cvmk.ops.triton.kernels.attention_masks import keys_of_rows, rows_of_keys, span
from cvmk.ops.triton.kernels.attention_scores import COARSE, LN2, LOG2E, is_coarse, load_rows, store_rows, tanh
from cvmk.ops.triton.kernels.common import cast, dot
from cvmk.ops.triton.kernels.dropout import column_words, dropout_key, kept, row_words

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def wide_scores(products, bias_at, seen, factor, ceiling, CAP: tl.constexpr):
    """Scores in float64, -inf where not `seen`, and the cap's tanh; factor and ceiling as `scores` takes them."""
    slope = products
    if CAP:
        slope = tanh(products * factor)
        products = slope * (ceiling * LN2)
    else:
        products = products * (factor * LN2)
    wide = products.to(tl.float64) + tl.load(bias_at, mask=seen, other=0.0).to(tl.float64)
    return tl.where(seen, wide, float("-inf")), slope


@triton.jit
def shifted(x, top):
    """(x - top) log2(e) in float32, in which top = -inf, of a row that has seen nothing, counts as 0."""
    return ((x - tl.where(top == float("-inf"), 0.0, top)) * LOG2E).to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def coarse_forward(
    Q, K, V, BIAS, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, SEED, OUT, LSE,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, bias_b, bias_h, bias_i, bias_j,
    kv_heads, group, rows, keys, sequences, left, right, factor, ceiling, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, LEFT: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows,) as `forward`, whose OUT and LSE are there. Rows whose scores are all -inf are done again too."""
    tiles = tl.cdiv(rows * group, BLOCK_M)
    pair = tl.program_id(0) // tiles
    b, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    r = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = r // group, kv_head * group + r % group
    inside = query < rows
    low, high = keys_of_rows(query, b, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, rows, keys, sequences, left, right, STEPS)
    query = query.to(tl.int64)
    statistic = (b * kv_heads * group + head) * rows + query
    lse = tl.load(LSE + statistic, mask=inside, other=0.0)
    high = tl.where((lse > -COARSE) & (lse < COARSE), low, high)
    alive = low < high
    start, _, _, end = span(low, high, BLOCK_N)
    words, key = None, None
    if SEED is not None:
        key = dropout_key(SEED)
        words = row_words(key, b, kv_heads * group, head, query)
    out = tl.zeros((BLOCK_M, DV_PADDED), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float64)
    q = load_rows(Q + b * q_b + head * q_h + query * q_t, alive, D, D_PADDED, True)
    for n in tl.range(start, end, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        at = columns.to(tl.int64)
        seen = (columns[None, :] < high[:, None]) & (columns[None, :] >= low[:, None])
        k = load_rows(K + b * k_b + kv_head * k_h + at * k_t, columns < end, D, D_PADDED, True)
        bias_at = BIAS + b * bias_b + (head * bias_h + query * bias_i)[:, None] + (at * bias_j)[None, :]
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        s, slope = wide_scores(s, bias_at, seen, factor, ceiling, CAP)
        best = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(shifted(s, best[:, None]))
        shrink = tl.exp2(shifted(top, best))
        total = total * shrink + tl.sum(p, 1)
        if SEED is not None:
            p = tl.where(kept(words[:, None], column_words(key, columns)[None, :], threshold), p, 0.0)
        v = load_rows(V + b * v_b + kv_head * v_h + at * v_t, columns < end, DV, DV_PADDED, True)
        out = dot(cast(p, v.dtype), v, out * shrink[:, None], PRECISION)
        top = best
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = tl.where(empty[:, None], 0.0, out * (keep_scale / total)[:, None])
    store_rows(OUT + b * o_b + head * o_h + query * o_t, out, alive, DV, DV_PADDED)
    wide = top + (tl.log2(total) * LN2).to(tl.float64)
    lse = tl.where((wide > -LARGEST) & (wide < LARGEST), wide, tl.where(wide > 0.0, LARGEST, -LARGEST)).to(tl.float32)
    lse = tl.where(wide == wide, tl.where(tl.abs(wide) == float("inf"), wide.to(tl.float32), lse), float("nan"))
    tl.store(LSE + statistic, tl.where(empty, float("-inf"), lse), mask=alive)


@triton.jit(do_not_specialize=VARYING)
def coarse_query_gradient(
    Q, K, V, BIAS, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, SEED, GRAD, OUT, LSE, GRAD_LSE, DELTA, TOP, LOG, DQ, DBIAS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, o_b, o_h, o_t, dq_b, dq_h, dq_t, bias_b, bias_h, bias_i, bias_j,
    kv_heads, group, rows, keys, sequences, left, right, factor, ceiling, threshold, keep_scale, scale,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, LEFT: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows,). Writes DELTA, TOP (float64, the maximum) and LOG (log2 of the sum below it) of coarse rows, and DQ unless it is None.

    DBIAS: zeros [B, H, rows, keys] for coarse rows, which get the gradient of a bias of that shape, or None.
    """
    tiles = tl.cdiv(rows * group, BLOCK_M)
    pair = tl.program_id(0) // tiles
    b, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    r = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = r // group, kv_head * group + r % group
    inside = query < rows
    low, high = keys_of_rows(query, b, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, rows, keys, sequences, left, right, STEPS)
    query = query.to(tl.int64)
    statistic = (b * kv_heads * group + head) * rows + query
    high = tl.where(is_coarse(tl.load(LSE + statistic, mask=inside, other=0.0)), high, low)
    alive = low < high
    start, _, _, end = span(low, high, BLOCK_N)
    K += b * k_b + kv_head * k_h
    V += b * v_b + kv_head * v_h
    bias_rows = BIAS + b * bias_b + head * bias_h + query * bias_i
    q = load_rows(Q + b * q_b + head * q_h + query * q_t, alive, D, D_PADDED, True)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float64)
    for n in tl.range(start, end, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        seen = (columns[None, :] < high[:, None]) & (columns[None, :] >= low[:, None])
        k = load_rows(K + columns.to(tl.int64) * k_t, columns < end, D, D_PADDED, True)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        s, slope = wide_scores(s, bias_rows[:, None] + (columns.to(tl.int64) * bias_j)[None, :], seen, factor, ceiling, CAP)
        best = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(shifted(top, best)) + tl.sum(tl.exp2(shifted(s, best[:, None])), 1)
        top = best
    log = tl.log2(tl.where(total == 0.0, 1.0, total))
    grad = load_rows(GRAD + b * g_b + head * g_h + query * g_t, alive, DV, DV_PADDED, True)
    out = load_rows(OUT + b * o_b + head * o_h + query * o_t, alive, DV, DV_PADDED, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if GRAD_LSE is not None:
        delta -= tl.load(GRAD_LSE + statistic, mask=alive, other=0.0)
    tl.store(DELTA + statistic, delta, mask=alive)
    tl.store(TOP + statistic, top, mask=alive)
    tl.store(LOG + statistic, log, mask=alive)
    if DQ is not None:
        words, key = None, None
        if SEED is not None:
            key = dropout_key(SEED)
            words = row_words(key, b, kv_heads * group, head, query)
        dq = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
        for n in tl.range(start, end, BLOCK_N):
            columns = n + tl.arange(0, BLOCK_N)
            at = columns.to(tl.int64)
            seen = (columns[None, :] < high[:, None]) & (columns[None, :] >= low[:, None])
            k = load_rows(K + at * k_t, columns < end, D, D_PADDED, True)
            v = load_rows(V + at * v_t, columns < end, DV, DV_PADDED, True)
            s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            s, slope = wide_scores(s, bias_rows[:, None] + (at * bias_j)[None, :], seen, factor, ceiling, CAP)
            p = tl.exp2(shifted(s, top[:, None]) - log[:, None])
            dp = dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            keep = None
            if SEED is not None:
                keep = kept(words[:, None], column_words(key, columns)[None, :], threshold)
            ds, dx = score_gradients(p, dp, delta[:, None], seen, slope, keep, keep_scale, CAP, SEED is not None, True)
            if DBIAS is not None:
                tl.store((DBIAS + statistic * keys)[:, None] + at[None, :], cast(ds, DBIAS.dtype.element_ty), mask=seen)
            dq = dot(cast(dx, k.dtype), k, dq, PRECISION)
        store_rows(DQ + b * dq_b + head * dq_h + query * dq_t, dq * scale, alive, D, D_PADDED)


@triton.jit(do_not_specialize=VARYING)
def coarse_key_gradient(
    Q, K, V, BIAS, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, SEED, GRAD, LSE, DELTA, TOP, LOG, DK, DV_OUT,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, bias_b, bias_h, bias_i, bias_j,
    kv_heads, group, rows, keys, sequences, left, right, factor, ceiling, threshold, keep_scale, scale,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, LEFT: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of keys,) as `key_gradient`, to whose DK and DV_OUT (None: not wanted) this adds what coarse rows give."""
    tiles = tl.cdiv(keys, BLOCK_N)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    low, high = rows_of_keys(columns, b, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, rows, keys, sequences, left, right, STEPS)
    low, high = low * group, high * group
    alive = low < high
    start, _, _, end = span(low, high, BLOCK_M)
    at, first_head = columns.to(tl.int64), kv_head * group
    k = load_rows(K + b * k_b + kv_head * k_h + at * k_t, alive, D, D_PADDED, True)
    v = load_rows(V + b * v_b + kv_head * v_h + at * v_t, alive, DV, DV_PADDED, True)
    key = None
    if SEED is not None:
        key = dropout_key(SEED)
    dk = tl.zeros((BLOCK_N, D_PADDED), tl.float32)
    dv = tl.zeros((BLOCK_N, DV_PADDED), tl.float32)
    found = 0
    for m in tl.range(start, end, BLOCK_M):
        r = m + tl.arange(0, BLOCK_M)
        query, head = (r // group).to(tl.int64), (r % group).to(tl.int64)
        statistic = (b * kv_heads * group + first_head + head) * rows + query
        coarse = is_coarse(tl.load(LSE + statistic, mask=r < end, other=0.0))
        seen = (r[None, :] >= low[:, None]) & (r[None, :] < high[:, None]) & coarse[None, :]
        coarse = coarse & (tl.max(seen.to(tl.int32), 0) > 0)
        if tl.max(coarse.to(tl.int32)) > 0:
            found += 1
            q = load_rows(Q + b * q_b + (first_head + head) * q_h + query * q_t, coarse, D, D_PADDED, True)
            grad = load_rows(GRAD + b * g_b + (first_head + head) * g_h + query * g_t, coarse, DV, DV_PADDED, True)
            bias_at = BIAS + b * bias_b + ((first_head + head) * bias_h + query * bias_i)[None, :] + (at * bias_j)[:, None]
            s = dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
            s, slope = wide_scores(s, bias_at, seen, factor, ceiling, CAP)
            top, log = tl.load(TOP + statistic, mask=coarse, other=0.0), tl.load(LOG + statistic, mask=coarse, other=0.0)
            p = tl.exp2(shifted(s, top[None, :]) - log[None, :])
            keep = None
            weight = p
            if SEED is not None:
                keep = kept(row_words(key, b, kv_heads * group, first_head + head, query)[None, :], column_words(key, columns)[:, None], threshold)
                weight = tl.where(keep, p, 0.0)
            dv = dot(cast(weight, grad.dtype), grad, dv, PRECISION)
            delta = tl.load(DELTA + statistic, mask=coarse, other=0.0)
            dp = dot(v, tl.trans(grad), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
            ds, dx = score_gradients(p, dp, delta[None, :], seen, slope, keep, keep_scale, CAP, SEED is not None, True)
            dk = dot(cast(dx, q.dtype), q, dk, PRECISION)
    changed = alive & (found > 0)
    if DK is not None:
        to = DK + b * dk_b + kv_head * dk_h + at * dk_t
        store_rows(to, load_rows(to, changed, D, D_PADDED, True).to(tl.float32) + dk * scale, changed, D, D_PADDED)
    if DV_OUT is not None:
        to = DV_OUT + b * dv_b + kv_head * dv_h + at * dv_t
        store_rows(to, load_rows(to, changed, DV, DV_PADDED, True).to(tl.float32) + dv * keep_scale, changed, DV, DV_PADDED)


@triton.jit(do_not_specialize=(*VARYING, "units", "share"))
def coarse_bias_gradient(
    Q, K, V, BIAS, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, SEED, GRAD, LSE, DELTA, TOP, LOG, DBIAS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, bias_b, bias_h, bias_i, bias_j,
    kv_heads, group, rows, keys, sequences, left, right, factor, ceiling, threshold, keep_scale, own_batch, own_heads, own_tiles, all_heads, all_tiles,
    units, share,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, LEFT: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid and arguments as those of `bias_gradient`, to whose DBIAS this adds what coarse rows give."""
    tiles = tl.cdiv(keys, BLOCK_N)
    which = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    own_tile, own_head, own_item = which % own_tiles, which // own_tiles % own_heads, which // own_tiles // own_heads
    at = columns.to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin, found = tl.program_id(1) * share, 0
    for unit in range(begin, tl.minimum(begin + share, units)):
        tile = own_tile + unit % all_tiles
        head = (own_head + unit // all_tiles % all_heads).to(tl.int64)
        b = (own_item + unit // all_tiles // all_heads).to(tl.int64)
        query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        low, high = keys_of_rows(query, b, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, rows, keys, sequences, left, right, STEPS)
        row = query.to(tl.int64)
        statistic = (b * kv_heads * group + head) * rows + row
        high = tl.where(is_coarse(tl.load(LSE + statistic, mask=query < rows, other=0.0)), high, low)
        start, _, _, end = span(low, high, BLOCK_N)
        if (tl.min(columns) < end) & (tl.max(columns) >= start):
            found += 1
            alive = low < high
            seen = (columns[None, :] < high[:, None]) & (columns[None, :] >= low[:, None])
            q = load_rows(Q + b * q_b + head * q_h + row * q_t, alive, D, D_PADDED, True)
            grad = load_rows(GRAD + b * g_b + head * g_h + row * g_t, alive, DV, DV_PADDED, True)
            k = load_rows(K + b * k_b + head // group * k_h + at * k_t, columns < end, D, D_PADDED, True)
            v = load_rows(V + b * v_b + head // group * v_h + at * v_t, columns < end, DV, DV_PADDED, True)
            bias_at = BIAS + b * bias_b + head * bias_h + (row * bias_i)[:, None] + (at * bias_j)[None, :]
            s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            s, slope = wide_scores(s, bias_at, seen, factor, ceiling, CAP)
            top, log = tl.load(TOP + statistic, mask=alive, other=0.0), tl.load(LOG + statistic, mask=alive, other=0.0)
            p = tl.exp2(shifted(s, top[:, None]) - log[:, None])
            dp = dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            keep = None
            if SEED is not None:
                key = dropout_key(SEED)
                words = row_words(key, b, kv_heads * group, tl.zeros((BLOCK_M,), tl.int64) + head, row)
                keep = kept(words[:, None], column_words(key, columns)[None, :], threshold)
            delta = tl.load(DELTA + statistic, mask=alive, other=0.0)
            ds, dx = score_gradients(p, dp, delta[:, None], seen, slope, keep, keep_scale, CAP, SEED is not None, True)
            sums += ds
    matrix = (tl.program_id(1) * own_batch + own_item).to(tl.int64) * own_heads + own_head
    if ROWS:
        own = own_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        to, inside = DBIAS + (matrix * rows + own)[:, None] * keys + columns[None, :], (own < rows)[:, None] & (columns < keys)[None, :] & (found > 0)
        tl.store(to, tl.load(to, mask=inside, other=0.0) + sums, mask=inside)
    else:
        to, inside = DBIAS + matrix * keys + columns, (columns < keys) & (found > 0)
        tl.store(to, tl.load(to, mask=inside, other=0.0) + tl.sum(sums, 0), mask=inside)
