"""The selective scan's backward pass: gradients of everything in one walk against the scan.

A program holds the adjoint [BLOCK_D, N] of some channels and takes a chunk of 64 steps at a time, the last one first. From the saved state
before the chunk it walks forward once and writes the state before every 4th step to its own scratch memory (32 bytes a step and channel
through the second-level cache); then, 4 steps at a time from the end, forward again keeping states and decays in registers, and back.

Limit: two 2^x a state and step are 2 cycles for N = 16 (9 ps on 132 multiprocessors at 1.75 GHz). The compiled loop has about 22 instructions
a warp for a channel and step, sums over channels and over states included, and 4 are issued a cycle: 5.5 cycles (24 ps) bound it.
What a step gives to dB and dC is summed over the
program's channels and written [blocks, N] a step; the sum over blocks is the caller's, in the order of the blocks: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.selective_scan import (
    CHUNK,
    LN_2,
    LOG2_E,
    STEPS,
    channels_of,
    columns,
    constant_weights,
    place,
    rows_of,
    sigmoid,
    span,
    step_sizes,
    tile_at,
    weights_at,
)

HALF: tl.constexpr = tl.constexpr(4)


@triton.jit
def scan_backward(
    grad, u, delta, z, A, D, bias, B, C, initial, ends, cu_seqlens, kept, scratch,
    du, ddelta, dz, dA, dB, dC, dD, dbias, dinitial,
    dim, groups, length, chunks, segment, grad_b, grad_d, u_b, u_d, delta_b, delta_d, z_b, z_d,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, TIMED_B: tl.constexpr, TIMED_C: tl.constexpr,
):  # fmt: skip
    """du, ddelta, dz [batch, dim, length]; of sums over time one piece a sequence and segment: dA [pieces, dim, N], dD, dbias [pieces, dim].

    dB, dC are pieces [pieces, dim, N] too where they are constant, and otherwise [batch, groups, blocks, length, BLOCK_N].
    ends [pieces, dim, N] or None: the adjoint behind each segment. scratch: 16 states of a program. dinitial [sequences, dim, N].
    """
    sequence, group, block, d, there = channels_of(dim, groups, BLOCK_D)
    row, low, high, start, stop = span(cu_seqlens, sequence, length, segment, REVERSE)
    PACKED: tl.constexpr = cu_seqlens is not None
    n = tl.arange(0, BLOCK_N)
    real = there[:, None] & (n < N)[None, :]
    tile = d.to(tl.int64)[:, None] * N + n[None, :]
    a2 = constant_weights(A, d, n, there, N) * LOG2_E
    offset = tl.zeros((BLOCK_D,), tl.float32) if bias is None else tl.load(bias + d, mask=there, other=0.0)
    grad_rows, u_rows = rows_of(grad, row, d, grad_b, grad_d, BLOCK_D), rows_of(u, row, d, u_b, u_d, BLOCK_D)
    delta_rows = rows_of(delta, row, d, delta_b, delta_d, BLOCK_D)
    du_rows, ddelta_rows = rows_of(du, row, d, dim * length, length, BLOCK_D), rows_of(ddelta, row, d, dim * length, length, BLOCK_D)
    if z is not None:
        z_rows, dz_rows = rows_of(z, row, d, z_b, z_d, BLOCK_D), rows_of(dz, row, d, dim * length, length, BLOCK_D)
    if D is not None:
        skip = tl.load(D + d, mask=there, other=0.0)[:, None]
        sum_D = tl.zeros((BLOCK_D, STEPS), tl.float32)
    blocks = tl.cdiv(dim // groups, BLOCK_D)
    timed = (row * groups + group) * (length + 2 * STEPS) * BLOCK_N
    partial = ((row * groups + group) * blocks + block) * length * BLOCK_N
    if TIMED_B:
        B += timed
        dB += partial
    else:
        b = constant_weights(B, d, n, there, N)
        sum_B = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if TIMED_C:
        C += timed
        dC += partial
    else:
        c = constant_weights(C, d, n, there, N)
        sum_C = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    piece = sequence.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    mine = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (CHUNK // HALF) * BLOCK_D * BLOCK_N
    scratch += mine + tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]
    through = tl.zeros((BLOCK_D, BLOCK_N), tl.float32) if ends is None else tl.load(ends + piece * dim * N + tile, mask=real, other=0.0)
    sum_A = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    sum_bias = tl.zeros((BLOCK_D, STEPS), tl.float32)
    first_chunk, last_chunk = start // CHUNK, tl.cdiv(stop, CHUNK)
    for i in range(last_chunk - first_chunk):
        chunk = last_chunk - 1 - i
        begin, end = tl.maximum(chunk * CHUNK, start // STEPS * STEPS), tl.minimum((chunk + 1) * CHUNK, stop)
        tiles = tl.cdiv(end - begin, STEPS)
        saved = chunk * CHUNK >= start
        x = tl.load(kept + (row * chunks + chunk) * dim * N + tile, mask=real & saved, other=0.0)
        if PACKED and initial is not None:
            x = tl.where(saved, x, tl.load(initial + sequence.to(tl.int64) * dim * N + tile, mask=real & (saved == 0), other=0.0))
        tl.debug_barrier()
        for j in range(tiles):
            base, at, inside = tile_at(begin + j * STEPS, low, high, length, PACKED, REVERSE)
            mask = inside & there[:, None]
            raw, step = step_sizes(delta_rows, offset, at, mask, inside, SOFTPLUS)
            value = tl.load(u_rows + at, mask=mask, other=0.0).to(tl.float32)
            steps, drives = columns(step, BLOCK_D, False), columns(step * value, BLOCK_D, False)
            for k in tl.static_range(8):
                if k % 4 == 0:
                    tl.store(scratch + (2 * j + k // 4) * BLOCK_D * BLOCK_N, x)
                if TIMED_B:
                    b = weights_at(B, base + (7 - k if REVERSE else k), low, high, n, BLOCK_N, PACKED)
                x = tl.exp2(steps[7 - k if REVERSE else k][:, None] * a2) * x + drives[7 - k if REVERSE else k][:, None] * b
                if N < BLOCK_N:
                    x = tl.where((n < N)[None, :], x, 0.0)
        tl.debug_barrier()
        for j in range(tiles):
            index = tiles - 1 - j
            base, at, inside = tile_at(begin + index * STEPS, low, high, length, PACKED, REVERSE)
            mask = inside & there[:, None]
            raw, step = step_sizes(delta_rows, offset, at, mask, inside, SOFTPLUS)
            value = tl.load(u_rows + at, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(grad_rows + at, mask=mask, other=0.0).to(tl.float32)
            dy = g
            if z is not None:
                gate = tl.load(z_rows + at, mask=mask, other=0.0).to(tl.float32)
                open = sigmoid(gate)
                dy = g * gate * open
                y = tl.zeros((BLOCK_D, STEPS), tl.float32)
            steps, drives, dys = columns(step, BLOCK_D, False), columns(step * value, BLOCK_D, False), columns(dy, BLOCK_D, False)
            from_input = tl.zeros((BLOCK_D, STEPS), tl.float32)
            from_decay = tl.zeros((BLOCK_D, STEPS), tl.float32)
            for half in tl.static_range(1, -1, -1):
                x = tl.load(scratch + (2 * index + half) * BLOCK_D * BLOCK_N)
                before, decays = (), ()
                for k in tl.static_range(4 * half, 4 * half + 4):
                    if TIMED_B:
                        b = weights_at(B, base + (7 - k if REVERSE else k), low, high, n, BLOCK_N, PACKED)
                    decay = tl.exp2(steps[7 - k if REVERSE else k][:, None] * a2)
                    before += (x,)
                    decays += (decay,)
                    x = decay * x + drives[7 - k if REVERSE else k][:, None] * b
                    if N < BLOCK_N:
                        x = tl.where((n < N)[None, :], x, 0.0)
                for k in tl.static_range(4 * half + 3, 4 * half - 1, -1):
                    if TIMED_B:
                        b = weights_at(B, base + (7 - k if REVERSE else k), low, high, n, BLOCK_N, PACKED)
                    if TIMED_C:
                        c = weights_at(C, base + (7 - k if REVERSE else k), low, high, n, BLOCK_N, PACKED)
                    t = base + (7 - k if REVERSE else k)
                    written = (t >= low) & (t < high) & (n >= 0)
                    dy_t, drive_t = dys[7 - k if REVERSE else k][:, None], drives[7 - k if REVERSE else k][:, None]
                    if z is not None:
                        y = place(y, tl.sum(x * c, 1), 7 - k if REVERSE else k)
                    if TIMED_C:
                        tl.store(dC + t * BLOCK_N + n, tl.sum(dy_t * x, 0), mask=written)
                    else:
                        sum_C += dy_t * x
                    h = dy_t * c + through
                    if N < BLOCK_N:
                        h = tl.where((n < N)[None, :], h, 0.0)
                    if TIMED_B:
                        tl.store(dB + t * BLOCK_N + n, tl.sum(drive_t * h, 0), mask=written)
                    else:
                        sum_B += drive_t * h
                    from_input = place(from_input, tl.sum(h * b, 1), 7 - k if REVERSE else k)
                    through = decays[k - 4 * half] * h
                    x = before[k - 4 * half]
                    w = through * x
                    from_decay = place(from_decay, tl.sum(w * a2, 1), 7 - k if REVERSE else k)
                    sum_A += w * steps[7 - k if REVERSE else k][:, None]
            dvalue = step * from_input
            dstep = value * from_input + LN_2 * from_decay
            if SOFTPLUS:
                dstep *= tl.where(raw > 20.0, 1.0, sigmoid(raw))
            dstep = tl.where(mask, dstep, 0.0)
            sum_bias += dstep
            if D is not None:
                dvalue += skip * dy
                sum_D += dy * value
            tl.store(du_rows + at, dvalue.to(du.dtype.element_ty), mask=mask)
            tl.store(ddelta_rows + at, dstep.to(ddelta.dtype.element_ty), mask=mask)
            if z is not None:
                if D is not None:
                    y += skip * value
                tl.store(dz_rows + at, (g * y * open * (1.0 + gate * (1.0 - open))).to(dz.dtype.element_ty), mask=mask)
    pieces = piece * dim
    tl.store(dA + pieces * N + tile, sum_A, mask=real)
    if not TIMED_B:
        tl.store(dB + pieces * N + tile, sum_B, mask=real)
    if not TIMED_C:
        tl.store(dC + pieces * N + tile, sum_C, mask=real)
    if D is not None:
        tl.store(dD + pieces + d, tl.sum(sum_D, 1), mask=there)
    if bias is not None:
        tl.store(dbias + pieces + d, tl.sum(sum_bias, 1), mask=there)
    if dinitial is not None:
        if tl.program_id(1) == 0:
            tl.store(dinitial + sequence.to(tl.int64) * dim * N + tile, through, mask=real)
