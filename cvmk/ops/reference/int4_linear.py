"""The reference of `cvmk.ops.int4_linear`; the law is in the docstring there."""

from __future__ import annotations

import torch

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import accumulation_dtype
from cvmk.ops.int4_linear import Call, Out
from cvmk.ops.quantize import QuantizedWeight
from cvmk.ops.reference._quantized import activate, activate_backward, product, product_backward


def _weight(c: Call) -> QuantizedWeight:
    return QuantizedWeight(c.values, c.scales, c.zeros, c.order, c.out_features, c.x.shape[1], 4, c.group_size, c.layout).plain()


def _pre_activation(c: Call, weight: QuantizedWeight) -> torch.Tensor:
    return product(c.x, weight, None if c.bias is None else c.bias.to(c.x.dtype))


def forward(c: Call) -> torch.Tensor:
    return activate(_pre_activation(c, _weight(c)), c.activation)


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    weight, grad = _weight(c), grads.out
    if c.activation is not None:
        grad = activate_backward(grad, _pre_activation(c, weight), c.activation)
    x_grad = product_backward(grad, weight) if needs.x else None
    if c.bias is None or not needs.bias:
        return x_grad, None
    return x_grad, grad.sum(0, dtype=accumulation_dtype(grad.dtype)).to(c.bias.dtype)


BACKENDS = (Backend("int4_linear", "reference", forward, backward),)
