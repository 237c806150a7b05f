"""The reference of `cvmk.ops.int4_linear`; the law is in the docstring there."""

from __future__ import annotations

import torch

from cvmk.ops._dispatch import Backend, accumulation_dtype, not_needed
from cvmk.ops.quantize import QuantizedWeight
from cvmk.ops.reference._quantized import activate, activate_backward, product, product_backward


def _weight(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    layout: str,
    out_features: int,
    group_size: int,
) -> QuantizedWeight:
    return QuantizedWeight(values, scales, zeros, order, out_features, x.shape[1], 4, group_size, layout).plain()


def forward(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    layout: str,
    out_features: int,
    group_size: int,
    activation: str | None,
) -> torch.Tensor:
    weight = _weight(x, values, scales, zeros, order, layout, out_features, group_size)
    return activate(product(x, weight, None if bias is None else bias.to(x.dtype)), activation)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    layout: str,
    out_features: int,
    group_size: int,
    activation: str | None,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = _weight(x, values, scales, zeros, order, layout, out_features, group_size)
    if activation is not None:
        grad = activate_backward(grad, product(x, weight, None if bias is None else bias.to(x.dtype)), activation)
    x_grad = product_backward(grad, weight) if needs[0] else not_needed(x)
    if bias is None:
        return x_grad, not_needed(x)
    return x_grad, grad.sum(0, dtype=accumulation_dtype(grad.dtype)).to(bias.dtype) if needs[5] else not_needed(bias)


BACKENDS = (Backend("int4_linear", "reference", forward, backward),)
