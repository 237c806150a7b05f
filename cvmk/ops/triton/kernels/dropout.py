"""The generator of dropout in `cvmk.ops._dropout`: one word a row, one a column."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def dropout_key(SEED):
    first, second = tl.load(SEED).to(tl.uint32), tl.load(SEED + 1).to(tl.uint32)
    return mix(mix(first) ^ second)


@triton.jit
def row_words(key, b, heads, head, queries):
    """One word a row: `head` and `queries` [n]."""
    return mix(mix(key + (b * heads + head).to(tl.uint32)) + queries.to(tl.uint32))


@triton.jit
def column_words(key, columns):
    """One word a key."""
    return mix(mix(columns.to(tl.uint32)) ^ key)


@triton.jit
def kept(rows, columns, threshold):
    """Which probabilities stay; rows and columns broadcast to the tile."""
    return mix(rows ^ columns) >= threshold.to(tl.uint32)


@triton.jit
def row_hashes(SEED, rows):
    """One word a row, where all rows are of one group."""
    return mix(mix(dropout_key(SEED)) + rows.to(tl.uint32))


@triton.jit
def drop(x, SEED, words, columns, keep_factor, threshold):
    """x [R, N] with dropout."""
    stays = kept(words[:, None], column_words(dropout_key(SEED), columns)[None, :], threshold)
    return tl.where(stays, x * keep_factor, 0.0)
