"""A linear layer on 8-bit integers: quantise the rows of x, multiply, scale, bias, activation, in one call.

The law, with acc = float32 (float64 for a float64 x), every step rounded to acc and no contraction:

    u[m, k] = x[m, k] * (1 / smooth_scale[k])                          (x itself without smooth_scale)
    a[m]    = max(max_k |u[m, k]|, 2^-100)
    q[m, k] = clamp(round_half_even(u[m, k] * (127 / a[m])), -127, 127)
    p[m, n] = sum_k q[m, k] * values[n, k]                             exact, in int32
    y[m, n] = p[m, n] * (a[m] / 127) * scales[n] + bias[n]             from the left
    out     = activation(y), rounded once to out_dtype

With input_range r the largest magnitude is not measured: a[m] = max(r, 2^-100) for all rows (static scales), and what lies beyond saturates at +-127.

So q and p are the same integers in every backend, whatever its order of summation; only the epilogue is subject to rounding. A row
of zeros gives activation(bias). A row of u with a NaN or infinity gives NaN in all its outputs and touches no other row.

SmoothQuant (Xiao et al. 2023): the weight that was quantised is W * smooth_scale, its inputs multiplied beforehand, so that
x / smooth_scale times it is x times W while large activations are moved into the weight. input_range is that of u.

Gradients are straight-through: rounding (and saturation) counts as the identity, the scales a[m] as constants of it, so with the pre-activation y
as computed above, g' = g * activation'(y) and W = dequantised weight,

    dx = (g' W) / smooth_scale,    dbias = sum_m g'[m].

They are the derivatives of activation(x / smooth_scale W^T + bias) taken where the quantised layer stands. smooth_scale, input_range and
the weight have none. The second derivative is that of the same function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cvmk.ops._call import make
from cvmk.ops._dtypes import autocast_lower
from cvmk.ops._op import Op
from cvmk.ops._watch import autocast_enabled
from cvmk.ops.quantize import QuantizedWeight, check_linear, check_vector, outputs

SMALLEST_MAXIMUM = 2.0**-100
"""Floor of a row's largest magnitude: far above what flushing denormal numbers touches, far below any activation."""

STATIC = "input_range is given, and this backend measures the largest magnitude of each row: leave input_range out"
"""The refusal of a backend without static scales."""


class Call(NamedTuple):
    x: torch.Tensor  # [M, K]
    values: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    smooth_scale: torch.Tensor | None
    input_range: torch.Tensor | None  # [1], float32
    layout: str
    out_features: int
    activation: str | None
    out_dtype: torch.dtype


class Out(NamedTuple):
    out: torch.Tensor  # [M, outputs]


op = Op(
    "int8_linear",
    Call,
    Out,
    fake_forward=lambda c: Out(c.x.new_empty(c.x.shape[0], outputs(c.out_features, c.activation), dtype=c.out_dtype)),
    differentiable=("x", "bias"),
)


@op.prepared_by
def prepare(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    *,
    smooth_scale: torch.Tensor | None = None,
    input_range: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Call:
    check_linear("int8_linear", 8, x, weight, bias, activation)
    if smooth_scale is not None:
        check_vector("int8_linear", "smooth_scale", smooth_scale, weight.in_features, x)
        smooth_scale = smooth_scale.detach()
    if input_range is not None:
        check_vector("int8_linear", "input_range", input_range, 1, x)
        input_range = input_range.detach().float()
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise TypeError(f"int8_linear: out_dtype is {out_dtype}; it must be floating")
    if autocast_enabled():
        (x,) = autocast_lower(x)
    flat = x if x.dim() == 2 else x.reshape(-1, weight.in_features)
    fields = (flat, weight.values, weight.scales, bias, smooth_scale, input_range, weight.layout, weight.out_features, activation, out_dtype or flat.dtype)
    return make(Call, fields)


def int8_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    *,
    smooth_scale: torch.Tensor | None = None,
    input_range: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Linear layer with 8-bit weights and rows of x quantised on the fly (symmetric, each by its largest magnitude or all by a given one). The law is the
    module's docstring.

    x             [..., K], floating. Under autocast it is cast as for `F.linear`.
    weight        `QuantizedWeight` [N, K] of `quantize_int8`; any M, N, K up to K = 133144.
    bias          [N], any floating dtype.
    smooth_scale  [K], any floating dtype: SmoothQuant's scale; the weight was multiplied by it before it was quantised.
    input_range   [1], any floating dtype, above 0: the magnitude that 127 stands for in all rows; larger ones saturate. None: each row's largest.
    activation    None, "relu", "gelu" (by erf), "silu", or "swiglu": the rows of the weight (and bias) are [gate; up], N / 2 each, and
                  the result is silu(gate) * up.
    out_dtype     dtype of the result; x's by default.

    Returns [..., N] ([..., N / 2] for swiglu). Raises TypeError and ValueError for arguments that do not fit.
    """
    out: torch.Tensor = op(prepare(x, weight, bias, smooth_scale=smooth_scale, input_range=input_range, activation=activation, out_dtype=out_dtype))
    return out if x.dim() == 2 else out.view(*x.shape[:-1], outputs(weight.out_features, activation))
