"""What the quantised linears do to their sums before they store them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """None, "relu", "gelu" (by erf) or "silu" of y in float32; NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return y / (1.0 + tl.exp(-y))
    else:
        return y


@triton.jit
def tile_of(blocks_m, blocks_n, GROUP: tl.constexpr):
    """(block of rows, block of outputs) of this program: GROUP blocks of rows share the weights in the cache before the next blocks of outputs."""
    at = tl.program_id(0)
    first = at // (GROUP * blocks_n) * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    within = at % (GROUP * blocks_n)
    return first + within % height, within // height
