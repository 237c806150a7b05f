"""What the reference's quantised linears share: activations, and products with a weight that is dequantised piece by piece."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from cvmk.ops._dtypes import accumulation_dtype
from cvmk.ops.quantize import QuantizedWeight, dequantized_rows, inverse_order

CHUNK_ELEMENTS = 1 << 22
"""Most elements of a weight that stand dequantised at one time."""


def activate(pre: torch.Tensor, activation: str | None) -> torch.Tensor:
    """The activation of [M, N]; "swiglu" takes [gate, up] halves and gives [M, N / 2]."""
    if activation is None:
        return pre
    if activation == "relu":
        return F.relu(pre)
    if activation == "gelu":
        return F.gelu(pre)
    if activation == "silu":
        return F.silu(pre)
    gate, up = pre.chunk(2, dim=1)
    return F.silu(gate) * up


def activate_backward(grad: torch.Tensor, pre: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient w.r.t. `pre` of `activate`, in the dtype of `pre`."""
    aten = torch.ops.aten
    found: torch.Tensor
    if activation == "relu":
        found = aten.threshold_backward(grad, pre, 0)
    elif activation == "gelu":
        found = aten.gelu_backward(grad, pre)
    elif activation == "silu":
        found = aten.silu_backward(grad, pre)
    else:
        gate, up = pre.chunk(2, dim=1)
        found = torch.cat((aten.silu_backward(grad * up, gate), grad * F.silu(gate)), dim=1)
    return found


def _chunks(weight: QuantizedWeight) -> Iterator[tuple[int, int]]:
    rows = max(1, CHUNK_ELEMENTS // weight.in_features)
    for start in range(0, weight.out_features, rows):
        yield start, min(start + rows, weight.out_features)


def product(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] times the dequantised weight, plus `bias` [N] of x's dtype: [M, N] in x's dtype; differentiable."""
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    pieces = [F.linear(x, dequantized_rows(weight, start, stop, x.dtype), None if bias is None else bias[start:stop]) for start, stop in _chunks(weight)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def product_backward(grad: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """grad [M, N] times the dequantised weight: [M, K], in the dtype of `grad` (sums over pieces in float32)."""
    found: torch.Tensor | None = None
    for start, stop in _chunks(weight):
        piece = grad[:, start:stop] @ dequantized_rows(weight, start, stop, grad.dtype)
        if stop - start == weight.out_features:
            found = piece
        elif found is None:
            found = piece.to(accumulation_dtype(grad.dtype))
        else:
            found += piece
    assert found is not None
    found = found.to(grad.dtype)
    return found if weight.order is None else found.index_select(1, inverse_order(weight.order))
