"""`flash_attention`, backward: the queries' gradient a tile of rows per program, then that of keys and values a tile of keys per program.

Limit. The scores and dO V^T are computed in both passes: seven products where one pass would do with five; but one pass has to add up the
queries' gradient between programs, in an order that changes (atomics) or through rows x keys / 128 partial sums, and here results are the
same in every run. D_i = <dO_i, O_i>, less the gradient of the log-sum-exp, is a by-product of the first pass, not a launch of its own.
Blocks are skipped, and masked on the edges only, as in the forward pass; the second pass holds its tiles [keys, rows], so that
probabilities and their gradients feed the tensor cores from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.attention_masks import keys_of_rows, rows_of_keys, span
from cvmk.ops.triton.kernels.attention_scores import LOG2E, finite, is_coarse, load_rows, power, scores, store_rows
from cvmk.ops.triton.kernels.common import cast, dot
from cvmk.ops.triton.kernels.dropout import column_words, dropout_key, kept, row_words

VARYING = ("rows", "keys", "sequences", "left", "right", "threshold")


@triton.jit
def score_gradients(p, dp, delta, seen, slope, keep, keep_scale, CAP: tl.constexpr, DROP: tl.constexpr, MASKED: tl.constexpr):
    """Gradients of the scores before and after the soft cap's own; `delta` broadcasts to the tile."""
    if DROP:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    dx = ds
    if CAP:
        dx = ds * (1.0 - slope * slope)
    return ds, dx


@triton.jit
def gather(
    dq, q, grad, minus, delta, K, V, first, last, end, low, high, bias_rows, dbias_rows, words, key, k_t, v_t, bias_j,
    factor, ceiling, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr, LEFT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `first` to `last` give to the rows' gradient (without the scale)."""
    block = tl.arange(0, BLOCK_N)
    for n in tl.range(first, last, BLOCK_N):
        columns = n + block
        k = load_rows(K + tl.cast(n, tl.int64) * k_t + block * k_t, columns < end, D, D_PADDED, MASKED)
        v = load_rows(V + tl.cast(n, tl.int64) * v_t + block * v_t, columns < end, DV, DV_PADDED, MASKED)
        seen = columns[None, :] < high[:, None]
        if LEFT:
            seen = seen & (columns[None, :] >= low[:, None])
        bias_at = None
        if bias_rows is not None:
            bias_at = (bias_rows + tl.cast(n, tl.int64) * bias_j)[:, None] + (block * bias_j)[None, :]
        s = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32), PRECISION)
        s, slope = scores(s, bias_at, seen, factor, ceiling, EARLY, CAP, MASKED)
        p = power(s, minus[:, None], factor, EARLY)
        dp = dot(grad, tl.trans(v), tl.zeros((q.shape[0], BLOCK_N), tl.float32), PRECISION)
        keep = None
        if DROP:
            keep = kept(words[:, None], column_words(key, columns)[None, :], threshold)
        ds, dx = score_gradients(p, dp, delta[:, None], seen, slope, keep, keep_scale, CAP, DROP, MASKED)
        if dbias_rows is not None:
            tl.store(dbias_rows[:, None] + columns[None, :], cast(ds, dbias_rows.dtype.element_ty), mask=seen & (low < high)[:, None])
        dq = dot(cast(dx, k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=VARYING)
def query_gradient(
    Q, K, V, BIAS, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, SEED, GRAD, OUT, LSE, GRAD_LSE, DELTA, DQ, DBIAS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, o_b, o_h, o_t, dq_b, dq_h, dq_t, bias_b, bias_h, bias_i, bias_j,
    kv_heads, group, rows, keys, sequences, left, right, factor, ceiling, threshold, keep_scale, scale,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, LEFT: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, all those of one batch item and key head after each other,). Writes DELTA [B, H, rows], and DQ unless it is None.

    DBIAS: zeros [B, H, rows, keys] that get the gradient of a bias of that shape, or None.
    """
    tiles = tl.cdiv(rows * group, BLOCK_M)
    pair = tl.program_id(0) // tiles
    b, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    r = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = r // group, kv_head * group + r % group
    inside = query < rows
    low, high = keys_of_rows(query, b, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, rows, keys, sequences, left, right, STEPS)
    query = query.to(tl.int64)
    statistic = (b * kv_heads * group + head) * rows + query
    if BIAS is not None:
        high = tl.where(is_coarse(tl.load(LSE + statistic, mask=inside, other=0.0)), low, high)
    start, middle, stop, end = span(low, high, BLOCK_N)
    grad = load_rows(GRAD + b * g_b + head * g_h + query * g_t, inside, DV, DV_PADDED, True)
    out = load_rows(OUT + b * o_b + head * o_h + query * o_t, inside, DV, DV_PADDED, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if GRAD_LSE is not None:
        delta -= tl.load(GRAD_LSE + statistic, mask=inside, other=0.0)
    tl.store(DELTA + statistic, delta, mask=inside)
    if DQ is not None:
        minus = finite(tl.load(LSE + statistic, mask=inside, other=0.0) * LOG2E)
        q = load_rows(Q + b * q_b + head * q_h + query * q_t, inside, D, D_PADDED, True)
        bias_rows, dbias_rows, words, key = None, None, None, None
        if BIAS is not None:
            bias_rows = BIAS + b * bias_b + tl.where(inside, head * bias_h + query * bias_i, 0)
        if DBIAS is not None:
            dbias_rows = DBIAS + statistic * keys
        if SEED is not None:
            key = dropout_key(SEED)
            words = row_words(key, b, kv_heads * group, head, query)
        K += b * k_b + kv_head * k_h
        V += b * v_b + kv_head * v_h
        dq = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
        if LEFT:
            dq = gather(
                dq, q, grad, minus, delta, K, V, start, middle, end, low, high, bias_rows, dbias_rows, words, key, k_t, v_t, bias_j,
                factor, ceiling, threshold, keep_scale, D, DV, D_PADDED, DV_PADDED, BLOCK_N, EARLY, CAP, SEED is not None, True, True, PRECISION,
            )  # fmt: skip
        dq = gather(
            dq, q, grad, minus, delta, K, V, middle, stop, end, low, high, bias_rows, dbias_rows, words, key, k_t, v_t, bias_j,
            factor, ceiling, threshold, keep_scale, D, DV, D_PADDED, DV_PADDED, BLOCK_N, EARLY, CAP, SEED is not None, LEFT, False, PRECISION,
        )  # fmt: skip
        dq = gather(
            dq, q, grad, minus, delta, K, V, stop, end, end, low, high, bias_rows, dbias_rows, words, key, k_t, v_t, bias_j,
            factor, ceiling, threshold, keep_scale, D, DV, D_PADDED, DV_PADDED, BLOCK_N, EARLY, CAP, SEED is not None, LEFT, True, PRECISION,
        )  # fmt: skip
        dq = tl.where((low < high)[:, None], dq * scale, 0.0)
        store_rows(DQ + b * dq_b + head * dq_h + query * dq_t, dq, inside, D, D_PADDED)


@triton.jit
def scatter(
    dk, dv, k, v, Q, GRAD, LSE, DELTA, BIAS, first, last, end, low, high, columns, key, b, kv_head, heads,
    q_h, q_t, g_h, g_t, bias_h, bias_i, bias_j, group, rows, factor, ceiling, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the rows from `first` to `last` give to the gradients of keys (without the scale) and values (without that of dropout).

    PACKED: between the rows that see keys of the tile may lie rows that see no key at all, and those must not be read (else there are none
    in between). Their mask is made in a layout of its own: `seen` itself would have to stay in registers during the products.
    """
    block = tl.arange(0, BLOCK_M)
    for m in tl.range(first, last, BLOCK_M):
        r = m + block
        inside = r < end
        if MASKED and PACKED:
            inside = tl.max(((r[:, None] >= low[None, :]) & (r[:, None] < high[None, :])).to(tl.int32), 1) > 0
        query, head = (r // group).to(tl.int64), (r % group).to(tl.int64)
        q = load_rows(Q + head * q_h + query * q_t, inside, D, D_PADDED, MASKED)
        grad = load_rows(GRAD + head * g_h + query * g_t, inside, DV, DV_PADDED, MASKED)
        lse = tl.load(LSE + head * rows + query, mask=inside, other=0.0)
        minus = finite(lse * LOG2E)
        seen = (r[None, :] >= low[:, None]) & (r[None, :] < high[:, None])
        bias_at = None
        if BIAS is not None:
            bias_at = BIAS + (head * bias_h + query * bias_i)[None, :] + (columns.to(tl.int64) * bias_j)[:, None]
            if not MASKED:
                # Keys that nobody sees stand in an unmasked tile too; their bias may lie behind the tensor.
                bias_at = tl.where((low < high)[:, None], bias_at, BIAS)
        s = dot(k, tl.trans(q), tl.zeros((k.shape[0], BLOCK_M), tl.float32), PRECISION)
        s, slope = scores(s, bias_at, seen, factor, ceiling, EARLY, CAP, MASKED)
        p = power(s, minus[None, :], factor, EARLY)
        if BIAS is not None:
            p = tl.where(is_coarse(lse)[None, :], 0.0, p)
        keep = None
        if key is not None:
            keep = kept(row_words(key, b, heads, kv_head * group + head, query)[None, :], column_words(key, columns)[:, None], threshold)
        if WANT_V:
            if key is not None:
                dv = dot(cast(tl.where(keep, p, 0.0), grad.dtype), grad, dv, PRECISION)
            else:
                dv = dot(cast(p, grad.dtype), grad, dv, PRECISION)
        if WANT_K:
            delta = tl.load(DELTA + head * rows + query, mask=inside, other=0.0)
            dp = dot(v, tl.trans(grad), tl.zeros((k.shape[0], BLOCK_M), tl.float32), PRECISION)
            _, dx = score_gradients(p, dp, delta[None, :], seen, slope, keep, keep_scale, CAP, key is not None, MASKED)
            dk = dot(cast(dx, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def key_gradient(
    Q, K, V, BIAS, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, SEED, GRAD, LSE, DELTA, DK, DV_OUT,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, bias_b, bias_h, bias_i, bias_j,
    kv_heads, group, rows, keys, sequences, left, right, factor, ceiling, threshold, keep_scale, scale,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, LEFT: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of keys, all those of one batch item and key head after each other,). DK and DV_OUT may be None."""
    tiles = tl.cdiv(keys, BLOCK_N)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    low, high = rows_of_keys(columns, b, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, rows, keys, sequences, left, right, STEPS)
    low, high = low * group, high * group
    alive = low < high
    start, middle, stop, end = span(low, high, BLOCK_M)
    at = columns.to(tl.int64)
    k = load_rows(K + b * k_b + kv_head * k_h + at * k_t, alive, D, D_PADDED, True)
    v = load_rows(V + b * v_b + kv_head * v_h + at * v_t, alive, DV, DV_PADDED, True)
    key = None
    if SEED is not None:
        key = dropout_key(SEED)
    first_head = kv_head * group
    Q += b * q_b + first_head * q_h
    GRAD += b * g_b + first_head * g_h
    LSE += (b * kv_heads * group + first_head) * rows
    DELTA += (b * kv_heads * group + first_head) * rows
    if BIAS is not None:
        BIAS += b * bias_b + first_head * bias_h
    dk = tl.zeros((BLOCK_N, D_PADDED), tl.float32)
    dv = tl.zeros((BLOCK_N, DV_PADDED), tl.float32)
    dk, dv = scatter(
        dk, dv, k, v, Q, GRAD, LSE, DELTA, BIAS, start, middle, end, low, high, columns, key, b, kv_head, kv_heads * group,
        q_h, q_t, g_h, g_t, bias_h, bias_i, bias_j, group, rows, factor, ceiling, threshold, keep_scale,
        D, DV, D_PADDED, DV_PADDED, BLOCK_M, EARLY, CAP, DK is not None, DV_OUT is not None, True, STEPS > 0, PRECISION,
    )  # fmt: skip
    dk, dv = scatter(
        dk, dv, k, v, Q, GRAD, LSE, DELTA, BIAS, middle, stop, end, low, high, columns, key, b, kv_head, kv_heads * group,
        q_h, q_t, g_h, g_t, bias_h, bias_i, bias_j, group, rows, factor, ceiling, threshold, keep_scale,
        D, DV, D_PADDED, DV_PADDED, BLOCK_M, EARLY, CAP, DK is not None, DV_OUT is not None, False, STEPS > 0, PRECISION,
    )  # fmt: skip
    dk, dv = scatter(
        dk, dv, k, v, Q, GRAD, LSE, DELTA, BIAS, stop, end, end, low, high, columns, key, b, kv_head, kv_heads * group,
        q_h, q_t, g_h, g_t, bias_h, bias_i, bias_j, group, rows, factor, ceiling, threshold, keep_scale,
        D, DV, D_PADDED, DV_PADDED, BLOCK_M, EARLY, CAP, DK is not None, DV_OUT is not None, True, STEPS > 0, PRECISION,
    )  # fmt: skip
    inside = columns < keys
    if DK is not None:
        dk = tl.where(alive[:, None], dk * scale, 0.0)
        store_rows(DK + b * dk_b + kv_head * dk_h + at * dk_t, dk, inside, D, D_PADDED)
    if DV_OUT is not None:
        dv = tl.where(alive[:, None], dv * keep_scale, 0.0)
        store_rows(DV_OUT + b * dv_b + kv_head * dv_h + at * dv_t, dv, inside, DV, DV_PADDED)
