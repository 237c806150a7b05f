"""`fused_linear` in PyTorch, for any dtype and device: the operations that it stands for, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import accumulation_dtype
from cvmk.ops.fused_linear import Call, Out, kept_dtype, kept_shape
from cvmk.ops.reference._dropout import kept_rows
from cvmk.ops.reference._quantized import activate, activate_backward


def _pre_activation(c: Call) -> Tensor:
    return F.linear(c.x.to(c.dtype), c.weight.to(c.dtype), None if c.bias is None else c.bias.to(c.dtype))


def _dropped(x: Tensor, c: Call) -> Tensor:
    keep = kept_rows(c.dropout_seed, c.dropout_p, *x.shape)
    return x if keep is None else torch.where(keep, x / (1 - c.dropout_p), 0)


def _bits(mask: Tensor) -> Tensor:
    """bool [M, N] -> uint8 [M, N / 8 rounded up], the first of eight in the lowest bit."""
    apart = F.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    bits: Tensor = apart << torch.arange(8, device=mask.device)
    return bits.sum(2).to(torch.uint8)


def _mask(bits: Tensor, columns: int) -> Tensor:
    """The inverse of `_bits`."""
    apart: Tensor = bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (apart & 1).flatten(1)[:, :columns].to(torch.bool)


def forward(c: Call) -> Out:
    pre = _pre_activation(c)
    kept = pre.new_empty(kept_shape(c), dtype=kept_dtype(c))
    if c.keep and c.activation is not None:
        kept = _bits(~(pre <= 0)) if c.activation == "relu" else pre.detach().clone()
    return Out(_dropped(activate(pre, c.activation), c), kept)


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    grad = _dropped(grads.out, c)
    if c.activation == "relu":
        grad = grad.masked_fill(~_mask(saved.kept, grad.shape[1]), 0)
    elif c.activation is not None:
        grad = activate_backward(grad, saved.kept, c.activation)
    return (
        (grad @ c.weight.to(c.dtype)).to(c.x.dtype) if needs.x else None,
        (grad.t() @ c.x.to(c.dtype)).to(c.weight.dtype) if needs.weight else None,
        grad.sum(0, dtype=accumulation_dtype(grad.dtype)).to(c.bias.dtype) if c.bias is not None and needs.bias else None,
    )


BACKENDS = (Backend("fused_linear", "reference", forward, backward),)
