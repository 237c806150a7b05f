"""A linear layer with 4-bit weights in groups: dequantise, multiply, bias, activation, in one call.

    w[n, order[k]] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g]      in float32 (float64 for a float64 x), rounded to x's dtype
    out[m, n]      = activation(sum_k x[m, k] w[n, k] + bias[n])           product in x's dtype, summed in float32

The reference dequantises a bounded piece of the weight at a time (4 Mi elements). Where x is finite, nothing but the weight is
approximate: the result is that of a linear layer with the dequantised weight. The gradients are its gradients,

    g' = g * activation'(y),   dx = g' W,   dbias = sum_m g'[m],

and the weight has none. Formats: GPTQ (Frantar et al. 2023), AWQ (Lin et al. 2024); bits in `cvmk.ops.quantize`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cvmk.ops._call import make
from cvmk.ops._dtypes import autocast_lower
from cvmk.ops._op import Op
from cvmk.ops._watch import autocast_enabled
from cvmk.ops.quantize import QuantizedWeight, check_linear, outputs


class Call(NamedTuple):
    x: torch.Tensor  # [M, K]
    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    bias: torch.Tensor | None
    layout: str
    out_features: int
    group_size: int
    activation: str | None


class Out(NamedTuple):
    out: torch.Tensor  # [M, outputs]


op = Op(
    "int4_linear",
    Call,
    Out,
    fake_forward=lambda c: Out(c.x.new_empty(c.x.shape[0], outputs(c.out_features, c.activation))),
    differentiable=("x", "bias"),
)


@op.prepared_by
def prepare(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None, *, activation: str | None = None) -> Call:
    check_linear("int4_linear", 4, x, weight, bias, activation)
    if autocast_enabled():
        x, bias = autocast_lower(x, bias)
    flat, w = x if x.dim() == 2 else x.reshape(-1, weight.in_features), weight
    return make(Call, (flat, w.values, w.scales, w.zeros, w.order, bias, w.layout, w.out_features, w.group_size, activation))


def int4_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None, *, activation: str | None = None) -> torch.Tensor:
    """Linear layer with 4-bit weights; x keeps its dtype. The law is the module's docstring.

    x           [..., K], floating. Under autocast it is cast as for `F.linear`, and so is the bias.
    weight      `QuantizedWeight` [N, K] of `quantize_int4`, or of a GPTQ or AWQ solver; any M and N.
    bias        [N], any floating dtype.
    activation  None, "relu", "gelu" (by erf), "silu", or "swiglu": the rows of the weight (and bias) are [gate; up], N / 2 each, and the
                result is silu(gate) * up.

    A NaN or an infinity in a row of x reaches that row's outputs only.
    Returns [..., N] ([..., N / 2] for swiglu) in x's dtype. Raises TypeError and ValueError for arguments that do not fit.
    """
    out: torch.Tensor = op(prepare(x, weight, bias, activation=activation))
    return out if x.dim() == 2 else out.view(*x.shape[:-1], outputs(weight.out_features, activation))
