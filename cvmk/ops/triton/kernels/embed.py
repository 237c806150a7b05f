"""Rows of an embedding matrix with scale, positions and dropout, and the rows of its gradient: tiles [R, N] of R places and N columns."""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.common import cast
from cvmk.ops.triton.kernels.dropout import drop, row_hashes


@triton.jit(do_not_specialize=["rows", "threshold"])
def embed_forward(
    IDS, WEIGHT, POSITIONS, SEED, OUT, rows, n, vocabulary, positions_rows, scale, keep_factor, threshold, R: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """An id without a row gives NaN: nothing outside of the matrix is read."""
    at, columns = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * N + tl.arange(0, N)
    inside = (at < rows)[:, None] & (columns < n)[None, :]
    ids = tl.load(IDS + at, mask=at < rows, other=0).to(tl.int64)
    known = (ids >= 0) & (ids < vocabulary)
    x = tl.load(WEIGHT + ids[:, None] * n + columns[None, :], mask=inside & known[:, None], other=float("nan")).to(tl.float32) * scale
    if POSITIONS is not None:
        x += tl.load(POSITIONS + (at % positions_rows).to(tl.int64)[:, None] * n + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if SEED is not None:
        x = drop(x, SEED, row_hashes(SEED, at), columns, keep_factor, threshold)
    tl.store(OUT + at.to(tl.int64)[:, None] * n + columns[None, :], cast(x, OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "threshold"])
def embed_rows(GRAD, SEED, ROWS, rows, n, scale, keep_factor, threshold, R: tl.constexpr, N: tl.constexpr):
    """The gradient of what was looked up, in float32."""
    at, columns = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * N + tl.arange(0, N)
    inside = (at < rows)[:, None] & (columns < n)[None, :]
    where = at.to(tl.int64)[:, None] * n + columns[None, :]
    g = tl.load(GRAD + where, mask=inside, other=0.0).to(tl.float32) * scale
    if SEED is not None:
        g = drop(g, SEED, row_hashes(SEED, at), columns, keep_factor, threshold)
    tl.store(ROWS + where, g, mask=inside)
