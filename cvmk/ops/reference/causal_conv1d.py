"""The short causal convolution and its single step in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._dtypes import accumulation_dtype
from cvmk.ops.causal_conv1d import ConvCall, ConvOut, UpdateCall


def _padding(c: ConvCall) -> Tensor | None:
    """[batch, 1, length], true where an input is not real; None where all are."""
    return None if c.lengths is None else (torch.arange(c.x.shape[2], device=c.x.device) >= c.lengths[:, None]).unsqueeze(1)


def _inputs(c: ConvCall, padding: Tensor | None) -> Tensor:
    """p of the op's formulas, [batch, dim, W - 1 + length], in the dtype of the computation."""
    dtype, (batch, dim, _), before = accumulation_dtype(c.x.dtype), c.x.shape, c.weight.shape[1] - 1
    x = c.x.to(dtype) if padding is None else c.x.to(dtype).masked_fill(padding, 0)
    start = x.new_zeros((batch, dim, before)) if c.initial_state is None else c.initial_state.to(dtype)
    return torch.cat((start, x), dim=2)


def _filtered(c: ConvCall, p: Tensor) -> Tensor:
    """pre of the op's formulas, [batch, dim, length]."""
    length, weight = c.x.shape[2], c.weight.to(p.dtype)
    pre = p[..., :length] * weight[:, :1]
    for k in range(1, weight.shape[1]):
        pre = pre + p[..., k : k + length] * weight[:, k : k + 1]
    return pre if c.bias is None else pre + c.bias.to(p.dtype)[:, None]


def _ends(c: ConvCall) -> Tensor:
    """Where in p each row's last state stands, int64 [batch, dim, W - 1]."""
    batch, dim, length = c.x.shape
    assert c.lengths is not None
    at = c.lengths.long().clamp(0, length)[:, None] + torch.arange(c.weight.shape[1] - 1, device=c.x.device)
    return at[:, None].expand(batch, dim, -1)


def _plain(c: ConvCall) -> ConvCall:
    """The same convolution with time last and forwards."""
    x = c.x.mT if c.channels_last else c.x
    return c._replace(x=_flipped(c, x) if c.reverse else x, channels_last=False, reverse=False)


def _flipped(c: ConvCall, x: Tensor) -> Tensor:
    """x [batch, dim, length] with the real inputs of each row in reverse order."""
    if c.lengths is None:
        return x.flip(2)
    length = x.shape[2]
    at, ends = torch.arange(length, device=x.device), c.lengths.long().clamp(0, length)[:, None]
    return x.gather(2, torch.where(at < ends, ends - 1 - at, at)[:, None].expand(x.shape))


def _in_order(c: ConvCall, x: Tensor) -> Tensor:
    """What belongs to the inputs of `_plain(c)`, as it belongs to those of c."""
    x = _flipped(c, x) if c.reverse else x
    return x.mT if c.channels_last else x


def forward(c: ConvCall) -> ConvOut:
    """Plain operations that autograd can follow, any number of times."""
    if c.channels_last or c.reverse:
        out, last_state = forward(_plain(c))
        return ConvOut(_in_order(c, out), last_state)
    padding = _padding(c)
    p = _inputs(c, padding)
    pre = _filtered(c, p)
    out = F.silu(pre) if c.silu else pre
    if padding is not None:
        out = out.masked_fill(padding, 0)
    last = p[..., c.x.shape[2] :] if c.lengths is None else p.gather(2, _ends(c))
    return ConvOut(out.to(c.x.dtype), last.to(c.x.dtype).clone(memory_format=torch.contiguous_format))


def backward(g: ConvOut, c: ConvCall, saved: ConvOut, needs: Any) -> tuple[Tensor | None, ...]:
    """By the formulas of `cvmk/ops/causal_conv1d.py`."""
    if c.channels_last or c.reverse:
        of_out = None if g.out is None else _plain(c._replace(x=g.out)).x
        of_x, *rest = backward(ConvOut(of_out, g.last_state), _plain(c), saved, needs)
        return None if of_x is None else _in_order(c, of_x), *rest
    padding, length, width = _padding(c), c.x.shape[2], c.weight.shape[1]
    p = _inputs(c, padding)
    weight = c.weight.to(p.dtype)
    d = p.new_zeros(c.x.shape) if g.out is None else g.out.to(p.dtype)
    if c.silu and g.out is not None:
        pre = _filtered(c, p)
        gate = torch.sigmoid(pre)
        d = d * gate * (1 + pre * (1 - gate))
    if padding is not None:
        d = d.masked_fill(padding, 0)
    dx = dinitial = None
    if needs.x or needs.initial_state:
        dp = torch.zeros_like(p)
        for k in range(width):
            dp[..., k : k + length] += d * weight[:, k : k + 1]
        if g.last_state is not None:
            ends = g.last_state.to(p.dtype)
            if c.lengths is None:
                dp[..., length:] += ends
            else:
                dp.scatter_add_(2, _ends(c), ends)
        dinitial, dx = dp[..., : width - 1], dp[..., width - 1 :]
        dx = dx if padding is None else dx.masked_fill(padding, 0)
    dweight = torch.stack([(d * p[..., k : k + length]).sum((0, 2)) for k in range(width)], 1) if needs.weight else None
    dbias = d.sum((0, 2)) if needs.bias else None
    found = zip((dx, dweight, dbias, dinitial), (c.x, c.weight, c.bias, c.initial_state), needs, strict=True)
    return tuple(grad.to(tensor.dtype) if needed and grad is not None and tensor is not None else None for grad, tensor, needed in found)


def update_forward(c: UpdateCall) -> Tensor:
    """One step; `state` is overwritten."""
    dtype = accumulation_dtype(c.x.dtype)
    p = torch.cat((c.state.to(dtype), c.x.to(dtype).unsqueeze(2)), dim=2)
    weight = c.weight.to(dtype)
    pre = p[..., 0] * weight[:, 0]
    for k in range(1, weight.shape[1]):
        pre = pre + p[..., k] * weight[:, k]
    if c.bias is not None:
        pre = pre + c.bias.to(dtype)
    c.state.copy_(p[..., 1:])
    return (F.silu(pre) if c.silu else pre).to(c.x.dtype)


BACKENDS = (
    Backend("causal_conv1d", "reference", forward, backward),
    Backend("causal_conv1d_update", "reference", update_forward),
)
