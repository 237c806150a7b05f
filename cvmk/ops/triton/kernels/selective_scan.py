"""The selective scan's forward pass, and the passes over segments that make it parallel along the sequence too.

Limit: a step of a channel takes one 2^x a state, 16 a cycle and multiprocessor, so N = 16 states cost 1 cycle (4.3 ps on 132 multiprocessors
at 1.75 GHz; about as much as the 5 other instructions a state at 4 x 32 a cycle); the 8 bytes of u, delta, z and out in bfloat16 cost 1.7 ps.
A program holds the states [BLOCK_D, N] of some channels in registers and walks along time, so nothing is computed twice and
nothing but inputs and outputs moves. It reads tiles of 8 steps, 16 bytes a row, and takes them apart into their columns (`columns`);
B and C lie with the states next to each other, one broadcast load a step. That is 1 program for 32 channels: with few of them the
sequence is cut into segments, `segment_ends` scans each from 0, `segment_starts` joins the ends, and the main pass starts each segment
from its own state, which costs the 2^x a second time and fills the device.

Positions: p counts steps in the order of the scan, which is from the end when reversed; a tile of 8 steps stands at columns base ... base + 7 in
memory either way. Steps outside of a sequence have step size 0: they change no state.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEPS: tl.constexpr = tl.constexpr(8)
CHUNK: tl.constexpr = tl.constexpr(64)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(v):
    """log(1 + e^v), v above 20. With e = e^-|v|: log(1 + e) = 2 atanh(e / (2 + e)), a series in at most 1 / 3; right to an ulp or two."""
    e = tl.exp(-tl.abs(v))
    s = e / (2.0 + e)
    q = s * s
    p = 0.06666666666666667 * q + 0.07692307692307693
    p = p * q + 0.09090909090909091
    p = p * q + 0.1111111111111111
    p = p * q + 0.14285714285714285
    p = p * q + 0.2
    p = p * q + 0.3333333333333333
    series = 2.0 * s + 2.0 * s * q * p
    return tl.where(v > 20.0, v, tl.where(v < 0.0, series, v + series))


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def halves(tile, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_D, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def columns(tile, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    """The 8 columns [BLOCK_D] of a tile, as a tuple.

    WHOLE where a thread has loaded all 8 columns of a channel (16 bytes): taking one is then no instruction, and a channel's states stay in
    that thread. Otherwise the tile is split in halves, which moves columns between threads once.
    """
    found = ()
    if WHOLE:
        bits = tile.to(tl.int32, bitcast=True)
        for t in tl.static_range(8):
            found += (tl.sum(tl.where(tl.arange(0, 8)[None, :] == t, bits, 0), 1).to(tl.float32, bitcast=True),)
    else:
        left, right = halves(tile, BLOCK_D, 8)
        quarters = halves(left, BLOCK_D, 4) + halves(right, BLOCK_D, 4)
        for i in tl.static_range(4):
            first, second = halves(quarters[i], BLOCK_D, 2)
            found += (tl.reshape(first, (BLOCK_D,)), tl.reshape(second, (BLOCK_D,)))
    return found


@triton.jit
def place(tile, column, t: tl.constexpr):
    """The tile with its column t replaced."""
    return tl.where(tl.arange(0, 8)[None, :] == t, column[:, None], tile)


@triton.jit
def channels_of(dim, groups, BLOCK_D: tl.constexpr):
    """(sequence, group, block of the group, channels [BLOCK_D], which of them are there) of this program."""
    width = dim // groups
    blocks = tl.cdiv(width, BLOCK_D)
    at = tl.program_id(0)
    block = at % blocks
    group = at // blocks % groups
    within = block * BLOCK_D + tl.arange(0, BLOCK_D)
    return at // (blocks * groups), group, block, group * width + within, within < width


@triton.jit
def span(cu_seqlens, sequence, length, segment, REVERSE: tl.constexpr):
    """(row of the batch, first and last column + 1 of the sequence, first and last position + 1 of the segment)."""
    if cu_seqlens is None:
        row, low, high, start = sequence, 0, length, tl.program_id(1) * segment
        stop = tl.minimum(start + segment, length)
    else:
        row = 0
        low = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int32), 0), length)
        high = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1).to(tl.int32), low), length)
        start = length - high if REVERSE else low
        stop = length - low if REVERSE else high
    return tl.full((), row, tl.int64), low, high, start, stop


@triton.jit
def tile_at(p, low, high, length, PACKED: tl.constexpr, REVERSE: tl.constexpr):
    """(base, columns [1, 8], which of them belong to the sequence) of the tile at position p, a multiple of 8."""
    base = length - STEPS - p if REVERSE else tl.multiple_of(p, STEPS)
    at = (base + tl.arange(0, STEPS))[None, :]
    if PACKED:
        return base, at, (at >= low) & (at < high)
    return base, at, (at >= 0 if REVERSE else at < length)


@triton.jit
def rows_of(pointer, row, d, stride_b, stride_d, BLOCK_D: tl.constexpr):
    """Where the channels of a row of the batch begin [BLOCK_D, 1]."""
    first = tl.min(d, 0).to(tl.int64)
    return (pointer + row * stride_b + first * stride_d) + (tl.arange(0, BLOCK_D) * stride_d)[:, None]


@triton.jit
def step_sizes(delta_rows, bias, at, mask, inside, SOFTPLUS: tl.constexpr):
    """(delta + bias, step sizes) [BLOCK_D, 8] in float32, the latter 0 outside of the sequence."""
    raw = tl.load(delta_rows + at, mask=mask, other=0.0).to(tl.float32) + bias[:, None]
    return raw, tl.where(inside, softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def weights_at(rows, t, low, high, n, BLOCK_N: tl.constexpr, PACKED: tl.constexpr):
    """B or C at column t [1, BLOCK_N], 0 outside of the sequence: 8 rows of zeros stand before column 0 and behind the last one."""
    at = rows + (t + STEPS) * BLOCK_N + n
    if PACKED:
        return tl.load(at, mask=(t >= low) & (t < high) & (n >= 0), other=0.0)[None, :]
    return tl.load(at)[None, :]


@triton.jit
def constant_weights(pointer, d, n, there, N: tl.constexpr):
    return tl.load(pointer + d[:, None] * N + n[None, :], mask=there[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def segment_ends(
    values, delta, z, A, bias, weights, ends, decays,
    dim, groups, length, segment, values_b, values_d, delta_b, delta_d, z_b, z_d,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, WHOLE: tl.constexpr, TIMED: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """What each segment makes of a state of 0, and by what it multiplies a state: ends, decays [batch, segments, dim, N].

    Of the scan itself values is u and weights B; of its adjoint, which runs against it, values is the gradient of out, weights C.
    """
    sequence, group, block, d, there = channels_of(dim, groups, BLOCK_D)
    row, low, high, start, stop = span(None, sequence, length, segment, REVERSE)
    n = tl.arange(0, BLOCK_N)
    a2 = constant_weights(A, d, n, there, N) * LOG2_E
    offset = tl.zeros((BLOCK_D,), tl.float32) if bias is None else tl.load(bias + d, mask=there, other=0.0)
    value_rows, delta_rows = rows_of(values, row, d, values_b, values_d, BLOCK_D), rows_of(delta, row, d, delta_b, delta_d, BLOCK_D)
    if z is not None:
        z_rows = rows_of(z, row, d, z_b, z_d, BLOCK_D)
    if TIMED:
        weights += (row * groups + group) * (length + 2 * STEPS) * BLOCK_N
    else:
        w = constant_weights(weights, d, n, there, N)
    x = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    tiles = tl.cdiv(stop - start, STEPS)
    for i in range(tiles):
        base, at, inside = tile_at(start + (tiles - 1 - i if ADJOINT else i) * STEPS, low, high, length, False, REVERSE)
        mask = inside & there[:, None]
        raw, step = step_sizes(delta_rows, offset, at, mask, inside, SOFTPLUS)
        value = tl.load(value_rows + at, mask=mask, other=0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z_rows + at, mask=mask, other=0.0).to(tl.float32)
            value *= gate * sigmoid(gate)
        total += tl.sum(step, 1)
        steps, drives = columns(step, BLOCK_D, WHOLE), columns(value if ADJOINT else step * value, BLOCK_D, WHOLE)
        for k in tl.static_range(8):
            if TIMED:
                w = weights_at(weights, base + (7 - k if REVERSE != ADJOINT else k), low, high, n, BLOCK_N, False)
            decay = tl.exp2(steps[7 - k if REVERSE != ADJOINT else k][:, None] * a2)
            drive = drives[7 - k if REVERSE != ADJOINT else k][:, None] * w
            x = decay * (x + drive) if ADJOINT else decay * x + drive
    out = (row * tl.num_programs(1) + tl.program_id(1)) * dim * N + d.to(tl.int64)[:, None] * N + n[None, :]
    real = there[:, None] & (n < N)[None, :]
    tl.store(ends + out, x, mask=real)
    tl.store(decays + out, tl.exp2(total[:, None] * a2), mask=real)


@triton.jit
def segment_starts(ends, decays, initial, segments, size, count, BLOCK: tl.constexpr, ADJOINT: tl.constexpr):
    """Put the state with which each segment starts in the place of its end. size: states of a row of the batch, count: of all rows."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    x = tl.zeros((BLOCK,), tl.float32) if initial is None else tl.load(initial + i, mask=there, other=0.0)
    for s in range(segments):
        at = (i // size * segments + (segments - 1 - s if ADJOINT else s)) * size + i % size
        end, decay = tl.load(ends + at, mask=there, other=0.0), tl.load(decays + at, mask=there, other=0.0)
        tl.store(ends + at, x, mask=there)
        x = decay * x + end


@triton.jit
def scan_forward(
    u, delta, z, out, A, D, bias, B, C, starts, cu_seqlens, last, kept,
    dim, groups, length, chunks, segment, u_b, u_d, delta_b, delta_d, z_b, z_d,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, WHOLE: tl.constexpr, TIMED_B: tl.constexpr, TIMED_C: tl.constexpr,
):  # fmt: skip
    """out [batch, dim, length], last [sequences, dim, N], and in kept [batch, chunks * dim, N] the states before every 64th step.

    starts [sequences * segments, dim, N] or None; B, C [dim, N] or TIMED [batch, groups, length + 16, BLOCK_N], with zeros around.
    """
    sequence, group, block, d, there = channels_of(dim, groups, BLOCK_D)
    row, low, high, start, stop = span(cu_seqlens, sequence, length, segment, REVERSE)
    n = tl.arange(0, BLOCK_N)
    d64, real = d.to(tl.int64)[:, None], there[:, None] & (n < N)[None, :]
    a2 = constant_weights(A, d, n, there, N) * LOG2_E
    offset = tl.zeros((BLOCK_D,), tl.float32) if bias is None else tl.load(bias + d, mask=there, other=0.0)
    u_rows, delta_rows = rows_of(u, row, d, u_b, u_d, BLOCK_D), rows_of(delta, row, d, delta_b, delta_d, BLOCK_D)
    out_rows = rows_of(out, row, d, dim * length, length, BLOCK_D)
    if z is not None:
        z_rows = rows_of(z, row, d, z_b, z_d, BLOCK_D)
    if D is not None:
        skip = tl.load(D + d, mask=there, other=0.0)[:, None]
    if TIMED_B:
        B += (row * groups + group) * (length + 2 * STEPS) * BLOCK_N
    else:
        b = constant_weights(B, d, n, there, N)
    if TIMED_C:
        C += (row * groups + group) * (length + 2 * STEPS) * BLOCK_N
    else:
        c = constant_weights(C, d, n, there, N)
    tile = d64 * N + n[None, :]
    piece = sequence.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    x = tl.zeros((BLOCK_D, BLOCK_N), tl.float32) if starts is None else tl.load(starts + piece * dim * N + tile, mask=real, other=0.0)
    for chunk in range(start // CHUNK, tl.cdiv(stop, CHUNK)):
        if kept is not None:
            tl.store(kept + (row * chunks + chunk) * dim * N + tile, x, mask=real & (chunk * CHUNK >= start))
        for p in range(tl.maximum(chunk * CHUNK, start // STEPS * STEPS), tl.minimum((chunk + 1) * CHUNK, stop), STEPS):
            base, at, inside = tile_at(p, low, high, length, cu_seqlens is not None, REVERSE)
            mask = inside & there[:, None]
            raw, step = step_sizes(delta_rows, offset, at, mask, inside, SOFTPLUS)
            value = tl.load(u_rows + at, mask=mask, other=0.0).to(tl.float32)
            steps, drives = columns(step, BLOCK_D, WHOLE), columns(step * value, BLOCK_D, WHOLE)
            y = skip * value if D is not None else tl.zeros((BLOCK_D, STEPS), tl.float32)
            found = tl.zeros((BLOCK_D, STEPS), tl.float32)
            for k in tl.static_range(8):
                if TIMED_B:
                    b = weights_at(B, base + (7 - k if REVERSE else k), low, high, n, BLOCK_N, cu_seqlens is not None)
                if TIMED_C:
                    c = weights_at(C, base + (7 - k if REVERSE else k), low, high, n, BLOCK_N, cu_seqlens is not None)
                x = tl.exp2(steps[7 - k if REVERSE else k][:, None] * a2) * x + drives[7 - k if REVERSE else k][:, None] * b
                if N < BLOCK_N:
                    x = tl.where((n < N)[None, :], x, 0.0)
                found = place(found, tl.sum(x * c, 1), 7 - k if REVERSE else k)
            y += found
            if z is not None:
                gate = tl.load(z_rows + at, mask=mask, other=0.0).to(tl.float32)
                y *= gate * sigmoid(gate)
            tl.store(out_rows + at, y.to(out.dtype.element_ty), mask=mask)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        tl.store(last + sequence.to(tl.int64) * dim * N + tile, x, mask=real)
