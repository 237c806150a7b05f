"""Which keys a query of `cvmk.ops.flash_attention` sees: always one interval.

Causal order, windows, key lengths and packed sequences each bound the keys of a row from below or above, so a row sees the keys
[low, high), and a key is seen by the rows of such an interval. Blocks outside all intervals of a tile are skipped, blocks inside all of
them need no mask, and only the ones on an edge are masked.

Rows of several query heads that share their keys are dealt with together: row r of a key head is query r // group of query head
r % group, so the interval of rows that see a key is `group` times that of queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 30)


@triton.jit
def sequence_of(CU_SEQLENS, at, sequences, STEPS: tl.constexpr):
    """The packed sequence each of `at` [n] lies in: -1 before the first, `sequences` or more behind the last. 2^STEPS > sequences + 1.

    Unrolled, for a loop that loads keeps Triton 3.7 from pipelining the loops that follow it.
    """
    low = tl.zeros_like(at)
    high = low + sequences + 1
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        starts = tl.load(CU_SEQLENS + middle, mask=low < high, other=0).to(tl.int32)
        before = (low < high) & (starts <= at)
        high = tl.where(before | (low >= high), high, middle)
        low = tl.where(before, middle + 1, low)
    return low - 1


@triton.jit
def key_length(KEY_LENGTHS, b, keys):
    """How many keys of batch item b are there, whatever integer KEY_LENGTHS holds."""
    length = keys
    if KEY_LENGTHS is not None:
        length = tl.maximum(tl.minimum(tl.load(KEY_LENGTHS + b), keys), 0).to(tl.int32)
    return length


@triton.jit
def first_position(QUERY_START, b, rows, keys):
    """The position of query 0 among the keys: of 64 bits where it is given, and then no sum with a window and a row is an overflow."""
    first = keys - rows
    if QUERY_START is not None:
        first = tl.minimum(tl.maximum(tl.load(QUERY_START + b).to(tl.int64), -FAR * FAR), FAR * FAR)
    return first


@triton.jit
def side(limit, QUERY_START):
    """A side of the window for such positions: FAR, no limit, is none for those of 64 bits either."""
    if QUERY_START is not None:
        limit = tl.where(limit == FAR, 4 * FAR * FAR, limit.to(tl.int64))
    return limit


@triton.jit
def within(bound, count):
    """A bound of an interval of `count` keys or rows as an integer of 32 bits. (Those of 32 bits already are left as they are.)"""
    if bound.dtype == tl.int64:
        bound = tl.minimum(tl.maximum(bound, 0), count).to(tl.int32)
    return bound


@triton.jit
def keys_of_rows(queries, b, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, rows, keys, sequences, left, right, STEPS: tl.constexpr):
    """low, high [n]: the keys that each query of batch item b sees; low >= high where there is none. left, right: FAR for no limit."""
    if CU_Q is not None:
        sequence = sequence_of(CU_Q, queries, sequences, STEPS)
        inside = (sequence >= 0) & (sequence < sequences) & (queries < rows)
        begin = tl.load(CU_K + sequence, mask=inside, other=0).to(tl.int32)
        end = tl.load(CU_K + sequence + 1, mask=inside, other=0).to(tl.int32)
        position = queries + end - tl.load(CU_Q + sequence + 1, mask=inside, other=0).to(tl.int32)
    else:
        begin = tl.zeros_like(queries)
        end = tl.where(queries < rows, key_length(KEY_LENGTHS, b, keys), 0)
        position = queries + first_position(QUERY_START, b, rows, keys)
    low = tl.maximum(begin, position - side(left, QUERY_START))
    high = tl.minimum(end, position + side(right, QUERY_START) + 1)
    return within(low, keys), within(high, keys)


@triton.jit
def rows_of_keys(columns, b, KEY_LENGTHS, QUERY_START, CU_Q, CU_K, rows, keys, sequences, left, right, STEPS: tl.constexpr):
    """low, high [n]: the queries of batch item b that see each key; low >= high where there is none."""
    if CU_Q is not None:
        sequence = sequence_of(CU_K, columns, sequences, STEPS)
        inside = (sequence >= 0) & (sequence < sequences) & (columns < keys)
        begin = tl.load(CU_Q + sequence, mask=inside, other=0).to(tl.int32)
        end = tl.load(CU_Q + sequence + 1, mask=inside, other=0).to(tl.int32)
        at = columns + end - tl.load(CU_K + sequence + 1, mask=inside, other=0).to(tl.int32)
    else:
        begin = tl.zeros_like(columns)
        end = tl.where(columns < key_length(KEY_LENGTHS, b, keys), rows, 0)
        at = columns - first_position(QUERY_START, b, rows, keys)
    low = tl.maximum(begin, at - side(right, QUERY_START))
    high = tl.minimum(end, at + side(left, QUERY_START) + 1)
    return within(low, rows), within(high, rows)


@triton.jit
def span(low, high, BLOCK: tl.constexpr):
    """start, middle, stop, end: blocks of BLOCK from `start` on cover all intervals; those in [middle, stop) lie inside every one.

    Empty intervals count for nothing, so their members of the tile hold garbage after an unmasked block.
    """
    alive = low < high
    start = tl.min(tl.where(alive, low, FAR))
    end = tl.max(tl.where(alive, high, 0))
    start = tl.minimum(start, end)
    from_ = tl.max(tl.where(alive, low, 0))
    to = tl.minimum(tl.min(tl.where(alive, high, FAR)), end)
    middle = tl.minimum(start + tl.cdiv(tl.maximum(from_ - start, 0), BLOCK) * BLOCK, end)
    stop = middle + tl.maximum(to - middle, 0) // BLOCK * BLOCK
    return start, middle, stop, end
