"""`flash_attention`, forward: a tile of rows per program, online softmax over blocks of keys.

Limit. 2 rows keys (D + Dv) products a head against one exponential a score: at D = Dv = 64 the two take equally long on Hopper, at 128 the
products twice as long; bytes matter only for short sequences and for one query, whose keys and values are read once. Hence
- the unmasked blocks are a loop of their own, with one multiply-add and one exponential a score; masks cost on the edges only,
- the query heads of one key head share a tile (query by query, so that a causal tile stays narrow) and so its keys and values,
- the longest tiles of a causal head start first, and the tiles of a head follow each other, so that its keys stay in L2,
- short sequences are one tile without a loop's prologue (ONE), and
- few rows over many keys are split into chunks of keys of a fixed size, whatever else is in the batch, which `combine` adds up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.attention_masks import keys_of_rows, span
from cvmk.ops.triton.kernels.attention_scores import LN2, finite, load_rows, power, scores, store_rows
from cvmk.ops.triton.kernels.common import cast, dot
from cvmk.ops.triton.kernels.dropout import column_words, dropout_key, kept, row_words

VARYING = ("rows", "keys", "sequences", "left", "right", "threshold")


@triton.jit
def attend(
    out, total, top, q, K, V, first, last, end, low, high, bias_rows, words, key, k_t, v_t, bias_j, factor, ceiling, threshold,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, DROP: tl.constexpr, LEFT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys from `first` to `last`, in blocks, to the rows' sums; all keys read are before `end`."""
    block = tl.arange(0, BLOCK_N)
    for n in tl.range(first, last, BLOCK_N):
        columns = n + block
        k = load_rows(K + tl.cast(n, tl.int64) * k_t + block * k_t, columns < end, D, D_PADDED, MASKED)
        seen = columns[None, :] < high[:, None]
        if LEFT:
            seen = seen & (columns[None, :] >= low[:, None])
        bias_at = None
        if bias_rows is not None:
            bias_at = (bias_rows + tl.cast(n, tl.int64) * bias_j)[:, None] + (block * bias_j)[None, :]
        s = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32), PRECISION)
        s, _ = scores(s, bias_at, seen, factor, ceiling, EARLY, CAP, MASKED)
        best = tl.max(s, 1)
        if not EARLY:
            best *= factor
        best = tl.maximum(top, best)
        minus = finite(best)
        p = power(s, minus[:, None], factor, EARLY)
        shrink = tl.exp2(top - minus)
        total = total * shrink + tl.sum(p, 1)
        if DROP:
            p = tl.where(kept(words[:, None], column_words(key, columns)[None, :], threshold), p, 0.0)
        v = load_rows(V + tl.cast(n, tl.int64) * v_t + block * v_t, columns < end, DV, DV_PADDED, MASKED)
        out = dot(cast(p, v.dtype), v, out * shrink[:, None], PRECISION)
        top = best
    return out, total, top


@triton.jit(do_not_specialize=VARYING)
def forward(
    Q, K, V, BIAS, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, SEED, OUT, LSE, TOTAL,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, bias_b, bias_h, bias_i, bias_j,
    kv_heads, group, rows, keys, sequences, left, right, factor, ceiling, threshold, keep_scale, pairs,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr, CAP: tl.constexpr, LEFT: tl.constexpr, STEPS: tl.constexpr, ONE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, all those of one batch item and key head after each other; chunks of keys).

    With TOTAL, OUT [chunks, pairs heads rows, DV], LSE and TOTAL [chunks, ...] get the chunk's sums and maximum for `combine`.
    """
    tiles = tl.cdiv(rows * group, BLOCK_M)
    pair = tl.program_id(0) // tiles
    b, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    r = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = r // group, kv_head * group + r % group
    inside = query < rows
    low, high = keys_of_rows(query, b, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, rows, keys, sequences, left, right, STEPS)
    start, middle, stop, end = span(low, high, BLOCK_N)
    query = query.to(tl.int64)
    bias_rows = None
    if BIAS is not None:
        bias_rows = BIAS + b * bias_b + tl.where(inside, head * bias_h + query * bias_i, 0)
    words, key = None, None
    if SEED is not None:
        key = dropout_key(SEED)
        words = row_words(key, b, kv_heads * group, head, query)
    K += b * k_b + kv_head * k_h
    V += b * v_b + kv_head * v_h

    out = tl.zeros((BLOCK_M, DV_PADDED), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    q = load_rows(Q + b * q_b + head * q_h + query * q_t, inside, D, D_PADDED, True)
    if ONE:
        if CHUNK > 0:
            chunk = tl.program_id(1) * CHUNK
            start, end = tl.maximum(start, chunk), tl.minimum(end, chunk + CHUNK)
            high = tl.minimum(high, end)
        out, total, top = attend(
            out, total, top, q, K, V, start, end, end, low, high, bias_rows, words, key, k_t, v_t, bias_j, factor, ceiling, threshold,
            D, DV, D_PADDED, DV_PADDED, BLOCK_N, EARLY, CAP, SEED is not None, LEFT, True, PRECISION,
        )  # fmt: skip
    else:
        if LEFT:
            out, total, top = attend(
                out, total, top, q, K, V, start, middle, end, low, high, bias_rows, words, key, k_t, v_t, bias_j, factor, ceiling, threshold,
                D, DV, D_PADDED, DV_PADDED, BLOCK_N, EARLY, CAP, SEED is not None, True, True, PRECISION,
            )  # fmt: skip
        out, total, top = attend(
            out, total, top, q, K, V, middle, stop, end, low, high, bias_rows, words, key, k_t, v_t, bias_j, factor, ceiling, threshold,
            D, DV, D_PADDED, DV_PADDED, BLOCK_N, EARLY, CAP, SEED is not None, LEFT, False, PRECISION,
        )  # fmt: skip
        out, total, top = attend(
            out, total, top, q, K, V, stop, end, end, low, high, bias_rows, words, key, k_t, v_t, bias_j, factor, ceiling, threshold,
            D, DV, D_PADDED, DV_PADDED, BLOCK_N, EARLY, CAP, SEED is not None, LEFT, True, PRECISION,
        )  # fmt: skip
    alive = low < high
    total = tl.where(alive, total, 0.0)
    if TOTAL is not None:
        part = tl.program_id(1).to(tl.int64) * pairs * group * rows + (b * kv_heads * group + head) * rows + query
        tl.store(LSE + part, tl.where(alive, top, float("-inf")), mask=inside)
        tl.store(TOTAL + part, total, mask=inside)
        store_rows(OUT + part * DV, out, inside & (total != 0.0), DV, DV_PADDED)
    else:
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        out = tl.where(empty[:, None], 0.0, out * (keep_scale / total)[:, None])
        store_rows(OUT + b * o_b + head * o_h + query * o_t, out, inside, DV, DV_PADDED)
        lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
        tl.store(LSE + (b * kv_heads * group + head) * rows + query, lse, mask=inside)


@triton.jit(do_not_specialize=("rows", "chunks"))
def combine(
    PARTS, TOPS, TOTALS, OUT, LSE, o_b, o_h, o_t, heads, rows, chunks, count, keep_scale, DV: tl.constexpr, DV_PADDED: tl.constexpr
):  # fmt: skip
    """Grid: (count,), one of the B H rows rows each: OUT and LSE from the sums of its chunks."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, DV_PADDED)
    out = tl.zeros((DV_PADDED,), tl.float32)
    total, top = 0.0, float("-inf")
    for chunk in range(chunks):
        part = row + tl.cast(chunk, tl.int64) * count
        part_top, part_total = tl.load(TOPS + part), tl.load(TOTALS + part)
        best = tl.maximum(top, part_top)
        minus = finite(best)
        shrink, weight = tl.exp2(top - minus), tl.exp2(part_top - minus)
        added = tl.load(PARTS + part * DV + columns, mask=columns < tl.where(part_total != 0.0, DV, 0), other=0.0)
        total = total * shrink + part_total * weight
        out = out * shrink + added * weight
        top = best
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    at = OUT + row // rows // heads * o_b + row // rows % heads * o_h + row % rows * o_t + columns
    tl.store(at, cast(out * (keep_scale / total), OUT.dtype.element_ty), mask=columns < DV)
    tl.store(LSE + row, tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2))
