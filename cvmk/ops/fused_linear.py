"""A linear layer of a model that is being trained: product, bias, activation and dropout in one call, and all of its gradients in another.

With x [M, K], W [N, K], b [N], every product of the operands as they are rounded to `dtype`, and sums in float32 (float64 for float64):

    p[m, n] = sum_k x[m, k] W[n, k] + b[n],    a = activation(p),    y[m, n] = a[m, n] kept[m, n] / (1 - dropout_p)

where swiglu reads p as the halves [gate, up] and gives silu(gate) * up, and `kept` is the hash of `cvmk.ops._dropout` with g = 0, i = m, j = n. y is rounded
once. For a gradient g of y, in the dtype of y:

    h = g kept / (1 - dropout_p),    q = h activation'(p),
    dx = q W,    dW = q^T x,    db[n] = sum_m q[m, n],

each summed as above and rounded once to the dtype of its argument, so that a float32 weight under autocast to bfloat16 has a float32 gradient. q is rounded
to `dtype` where it is multiplied. swiglu: q = [h up silu'(gate), h silu(gate)].

What is kept for the backward pass is x, W and, of an activation, what its derivative needs: a bit for each p of a relu, p in the dtype of y for the others.
The dropout's mask is made again from the seed. The weight is rounded and packed at every call, by all threads: at M = 2,040 rows that is one or two hundredths
of the call, and there is nothing that could be stale when the weight is changed in place, by whatever way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cvmk.ops._call import make
from cvmk.ops._dropout import checked_probability, draw_seed
from cvmk.ops._dtypes import autocast_dtype
from cvmk.ops._op import Op
from cvmk.ops._watch import autocast_enabled
from cvmk.ops.quantize import ACTIVATIONS, check_vector, outputs

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None
    dropout_seed: Tensor | None
    activation: str | None
    dropout_p: float
    dtype: torch.dtype  # of the operands as they are multiplied, and of the result
    keep: bool  # whether the backward pass will need `kept`; autograd sets it


class Out(NamedTuple):
    out: Tensor  # [M, outputs]
    kept: Tensor
    """relu: bits uint8 [M, N / 8 rounded up]; bit n % 8 of byte n // 8 says that p is not 0 or less. Other activations: p [M, N]. No elements where nothing is
    kept."""


def kept_shape(c: Call) -> tuple[int, ...]:
    """The shape of `Out.kept`."""
    if not c.keep or c.activation is None:
        return (0,)
    rows, columns = c.x.shape[0], c.weight.shape[0]
    return (rows, -(-columns // 8)) if c.activation == "relu" else (rows, columns)


def kept_dtype(c: Call) -> torch.dtype:
    """The dtype of `Out.kept`."""
    return torch.uint8 if c.activation is None or c.activation == "relu" else c.dtype


def _fake_forward(c: Call) -> Out:
    out = c.x.new_empty(c.x.shape[0], outputs(c.weight.shape[0], c.activation), dtype=c.dtype)
    return Out(out, c.x.new_empty(kept_shape(c), dtype=kept_dtype(c)))


op = Op("fused_linear", Call, Out, fake_forward=_fake_forward, differentiable=("x", "weight", "bias"), saved=("kept",), keeps="keep")


@op.prepared_by
def prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, dropout_p: float = 0.0
) -> Call:
    lowered = autocast_dtype(x) if autocast_enabled() else None
    dtype = _check_operands(x, weight, lowered)
    if bias is not None:
        check_vector("fused_linear", "bias", bias, weight.shape[0], x)
    if activation is not None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"fused_linear: activation is {activation!r}, not None or one of {', '.join(ACTIVATIONS)}")
        if activation == "swiglu" and weight.shape[0] % 2:
            raise ValueError(f"fused_linear: swiglu needs an even number of outputs [gate, up]; the weight has {weight.shape[0]}")
    flat = x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 1 else x[None]
    return make(Call, (flat, weight, bias, None, activation, checked_probability(dropout_p), dtype, False))


def _check_operands(x: Tensor, weight: Tensor, lowered: torch.dtype | None) -> torch.dtype:
    """The dtype of the products, `lowered` under autocast. Raises TypeError and ValueError."""
    dtype = x.dtype
    if weight.dim() != 2:
        raise ValueError(f"fused_linear: weight is {list(weight.shape)}; it must be [N, K]")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"fused_linear: x is {list(x.shape)}; its last dimension must be the weight's {weight.shape[1]} inputs")
    if not (x.is_cpu and weight.is_cpu) and x.device != weight.device:
        raise ValueError(f"fused_linear: x is on {x.device} and weight on {weight.device}; they must be on one device")
    if not dtype.is_floating_point or not weight.is_floating_point():
        raise TypeError(f"fused_linear: x is {dtype} and weight {weight.dtype}; both must be floating")
    if lowered is not None and dtype in _NARROW and weight.dtype in _NARROW:
        return lowered
    if weight.dtype != dtype:
        raise TypeError(f"fused_linear: x is {dtype} and weight {weight.dtype}; outside of autocast they must be of one dtype")
    return dtype


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, dropout_p: float = 0.0) -> Tensor:
    """dropout(activation(x W^T + b)), as `F.linear`, an activation and `F.dropout` compute it, in one pass. The law is the module's docstring.

    x           [..., K], floating.
    weight      [N, K], of x's dtype. Under autocast both are rounded to its dtype as for `F.linear`, and their gradients come back in their own.
    bias        [N], any floating dtype; it is added in the precision of the sums.
    activation  None, "relu", "gelu" (by erf), "silu", or "swiglu" (Shazeer 2020): the rows of the weight (and bias) are [gate; up], N / 2 each, and the
                result is silu(gate) * up.
    dropout_p   probability, in [0, 1), with which an element of the result is set to 0; the others are divided by 1 - dropout_p. A call with one draws a
                seed from torch's generator for the device of x.

    Returns [..., N] ([..., N / 2] for swiglu) in the dtype of x, under autocast in its dtype. Gradients: x, weight and bias; what is not asked for is not
    computed. Raises TypeError for a wrong dtype and a dropout_p that asks for a gradient, ValueError for a wrong shape, activation or probability.
    """
    call = prepare(x, weight, bias, activation=activation, dropout_p=dropout_p)
    if call.dropout_p > 0:
        call = call._replace(dropout_seed=draw_seed(x.device))
    out: Tensor = op(call)[0]
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[1])
