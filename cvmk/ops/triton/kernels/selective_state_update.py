"""One step of the selective scan. Bound by memory: the state is read and written once (0.42 ps a float32 state at 4.8 TB/s and both ways),
everything else is small. A program takes BLOCK rows (a row is a channel of a head) with all their states; sums over states stay in a warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.selective_scan import LOG2_E, sigmoid, softplus


@triton.jit
def vector(pointer, h, d, stride_h, stride_d, there):
    return tl.load(pointer + h * stride_h + d * stride_d, mask=there, other=0.0).to(tl.float32)


@triton.jit
def state_update(
    state, x, dt, A, B, C, D, z, bias, y,
    heads, dim, groups, state_b, state_h, state_d, state_n, x_b, x_h, x_d, dt_b, dt_h, dt_d, A_h, A_d, A_n,
    B_b, B_g, B_n, C_b, C_g, C_n, D_h, D_d, z_b, z_h, z_d, bias_h, bias_d,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """state [batch, heads, dim, N] becomes the state after the step, y [batch, heads, dim] is contiguous; all strides in elements."""
    blocks = tl.cdiv(heads * dim, BLOCK)
    batch, rows = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there = rows < heads * dim
    n = tl.arange(0, BLOCK_N)
    h, d = (rows // dim).to(tl.int64), (rows % dim).to(tl.int64)
    real = there[:, None] & (n < N)[None, :]
    step = vector(dt + batch * dt_b, h, d, dt_h, dt_d, there)
    if bias is not None:
        step += vector(bias, h, d, bias_h, bias_d, there)
    if SOFTPLUS:
        step = softplus(step)
    value = vector(x + batch * x_b, h, d, x_h, x_d, there)
    group = h // (heads // groups)
    weights_b = tl.load(B + batch * B_b + group[:, None] * B_g + n[None, :] * B_n, mask=real, other=0.0).to(tl.float32)
    weights_c = tl.load(C + batch * C_b + group[:, None] * C_g + n[None, :] * C_n, mask=real, other=0.0).to(tl.float32)
    a2 = tl.load(A + h[:, None] * A_h + d[:, None] * A_d + n[None, :] * A_n, mask=real, other=0.0).to(tl.float32) * LOG2_E
    at = state + batch * state_b + h[:, None] * state_h + d[:, None] * state_d + n[None, :] * state_n
    new = tl.exp2(step[:, None] * a2) * tl.load(at, mask=real, other=0.0).to(tl.float32) + (step * value)[:, None] * weights_b
    tl.store(at, new.to(state.dtype.element_ty), mask=real)
    out = tl.sum(tl.where(real, new * weights_c, 0.0), 1)
    if D is not None:
        out += value * vector(D, h, d, D_h, D_d, there)
    if z is not None:
        gate = vector(z + batch * z_b, h, d, z_h, z_d, there)
        out *= gate * sigmoid(gate)
    tl.store(y + batch * heads * dim + rows, out.to(y.dtype.element_ty), mask=there)
