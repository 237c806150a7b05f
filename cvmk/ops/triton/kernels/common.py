"""What kernels share. Arithmetic is in float32 after every load and before every store: the interpreter computes bfloat16 wrongly."""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops import triton as backend

INTERPRETED = tl.constexpr(backend.INTERPRETED)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr = "tf32x3"):
    """accumulator + a b with float32 sums; a and b float32 (multiplied as PRECISION says), bfloat16 or float16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    if a.dtype == tl.float32:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)
    return tl.dot(a, b, accumulator)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """float32 to DTYPE, to the nearest; the interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)
