"""The reference of `cvmk.ops.int8_linear`; the law is in the docstring there."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional as F

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs
from cvmk.ops._dtypes import accumulation_dtype
from cvmk.ops.int8_linear import SMALLEST_MAXIMUM, Call, Out
from cvmk.ops.quantize import QuantizedWeight
from cvmk.ops.reference._quantized import activate, activate_backward, product, product_backward

_EXACT_FLOAT32_INPUTS = 1024
"""Sums of so many products of values of at most 127 stay below 2**24, where float32 holds every integer."""

_PIECE_ELEMENTS = 1 << 19
"""Elements of a piece of rows on the CPU: its float32 intermediates stay in the cache and in memory that the process already has."""


def smoothed(x: torch.Tensor, smooth_scale: torch.Tensor | None) -> torch.Tensor:
    """x * (1 / smooth_scale) in float32 (float64 for float64)."""
    wide = x.to(accumulation_dtype(x.dtype))
    return wide if smooth_scale is None else wide * smooth_scale.to(wide.dtype).reciprocal()


@torch.no_grad()
def quantize_rows(wide: torch.Tensor, input_range: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, K] in float32 or float64 -> int8 [M, K] and the scales [M, 1]; with input_range [1] all by that magnitude.

    A row that is not finite becomes zeros with a scale of infinity or NaN: their products are NaN.
    """
    floor = wide.abs().amax(1, keepdim=True).clamp_(min=SMALLEST_MAXIMUM)
    if input_range is not None:
        floor = torch.where(floor.isfinite(), input_range.to(wide.dtype).clamp(min=SMALLEST_MAXIMUM), floor)
    steps = torch.full_like(floor, 127.0)  # a tensor: PyTorch turns a division by or of a number into a product with a reciprocal
    values = (wide * (steps / floor)).round_().clamp_(-127, 127).nan_to_num_(nan=0.0)
    return values.to(torch.int8), floor / steps


def exact_product(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] times the transpose of int8 [N, K]: int32 [M, N], exact."""
    if values.is_cuda:
        return _cuda_product(values, weight)
    if values.shape[1] > 1 and _int_mm_is_exact():  # with one product a sum, `_int_mm` of the CPU returns whatever memory holds (torch 2.13)
        return torch._int_mm(values.contiguous(), weight.contiguous().t())  # other strides give wrong sums without an error
    found = torch.zeros(values.shape[0], weight.shape[0], dtype=torch.int32, device=values.device)
    for start in range(0, values.shape[1], _EXACT_FLOAT32_INPUTS):
        span = slice(start, start + _EXACT_FLOAT32_INPUTS)
        found += (values[:, span].float() @ weight[:, span].float().t()).to(torch.int32)
    return found


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` on this CPU sums in int32: without VNNI it adds pairs of products in 16 bits, which saturate."""
    try:
        for rows in (1, 64):
            extreme = torch.full((rows + 32, 256), 127, dtype=torch.int8)
            if not bool((torch._int_mm(extreme[32:], extreme[:32].t()) == 127 * 127 * 256).all()):
                return False
    except RuntimeError:
        return False
    return True


def _cuda_product(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """On CUDA `torch._int_mm` wants more than 16 rows, and K and N in multiples of 8: pad with zeros where they are not."""
    (m, k), n = values.shape, weight.shape[0]
    if m == 0:
        return torch.empty(0, n, dtype=torch.int32, device=values.device)
    more_m, more_k, more_n = max(0, 32 - m), -k % 8, -n % 8
    values = F.pad(values, (0, more_k, 0, more_m)) if more_k or more_m else values
    weight = F.pad(weight, (0, more_k, 0, more_n)) if more_k or more_n else weight
    return torch._int_mm(values.contiguous(), weight.contiguous().t())[:m, :n]


class _StraightThrough(torch.autograd.Function):
    """The first argument's value with the second one's gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grad


def _pre_activation(x: torch.Tensor, weight: QuantizedWeight, c: Call) -> torch.Tensor:
    """[M, N] in float32 (float64 for float64), before the activation, of rows x of a call."""
    wide, bias = smoothed(x, c.smooth_scale), c.bias
    values, row_scales = quantize_rows(wide, c.input_range)
    pre = exact_product(values, weight.values).to(wide.dtype).mul_(row_scales).mul_(weight.scales)
    if torch.is_grad_enabled() and wide.requires_grad:
        pre = _StraightThrough.apply(pre, product(wide, weight))
    if bias is None:
        return pre
    bias = bias.to(wide.dtype)
    return pre + bias if torch.is_grad_enabled() else pre.add_(bias)


def _weight(c: Call) -> QuantizedWeight:
    return QuantizedWeight(c.values, c.scales, None, None, c.out_features, c.x.shape[1], 8, c.x.shape[1], c.layout).plain()


def forward(c: Call) -> torch.Tensor:
    weight = _weight(c)
    rows = max(128, _PIECE_ELEMENTS // max(weight.shape))
    if c.x.is_cuda or torch.is_grad_enabled() or c.x.shape[0] <= rows:
        return activate(_pre_activation(c.x, weight, c), c.activation).to(c.out_dtype)
    return torch.cat([activate(_pre_activation(piece, weight, c), c.activation).to(c.out_dtype) for piece in c.x.split(rows)])


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    weight = _weight(c)
    grad = grads.out.to(accumulation_dtype(c.x.dtype))
    if c.activation is not None:
        grad = activate_backward(grad, _pre_activation(c.x, weight, c), c.activation)
    x_grad = None
    if needs.x:
        x_grad = product_backward(grad.to(c.x.dtype), weight)
        if c.smooth_scale is not None:
            x_grad = smoothed(x_grad, c.smooth_scale).to(c.x.dtype)
    return x_grad, grad.sum(0).to(c.bias.dtype) if c.bias is not None and needs.bias else None


BACKENDS = (Backend("int8_linear", "reference", forward, backward),)
