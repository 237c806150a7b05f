"""One step of AdamW over flat memory, gradient clipping included.

AdamW (Loshchilov & Hutter 2019) at step t >= 1, with g the gradient times `grad_scale`:

    m_t = beta1 m + (1 - beta1) g,    v_t = beta2 v + (1 - beta2) g^2
    w_t = (1 - eta lambda) w - eta (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps)

The corrections of the moments' bias are numbers, so that an element takes one division and one root:
    w_t = keep w - rate m_t / (root sqrt(v_t) + eps),  keep = 1 - eta lambda,  rate = eta / (1 - beta1^t),  root = 1 / sqrt(1 - beta2^t).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cvmk.ops._call import Written, integer, make, number
from cvmk.ops._op import Op

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    param: Written
    exp_avg: Written
    exp_avg_sq: Written
    grad: Tensor
    grad_scale: Tensor | None
    step: int
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Out(NamedTuple):
    """Nothing: the op writes to its arguments."""


op = Op("adamw", Call, Out, fake_forward=lambda c: None)


class Numbers(NamedTuple):
    """What a step multiplies by, in the module's words."""

    keep: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    rate: float
    root: float
    eps: float


def numbers(c: Call) -> Numbers:
    rate, root = c.learning_rate / (1 - c.beta1**c.step), (1 - c.beta2**c.step) ** -0.5
    return Numbers(1 - c.learning_rate * c.weight_decay, c.beta1, 1 - c.beta1, c.beta2, 1 - c.beta2, rate, root, c.eps)


@op.prepared_by
def prepare(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: Tensor | None = None,
) -> Call:
    for name, tensor in (("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("grad_scale", grad_scale)):
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS or tensor.dtype != param.dtype:
            raise TypeError(f"adamw: {name} is {tensor.dtype} and param {param.dtype}; param, grad, moments and grad_scale must have one floating-point dtype")
        if tensor.device != param.device:
            raise ValueError(f"adamw: {name} is on {tensor.device}, but param on {param.device}")
        if tensor.shape != (() if name == "grad_scale" else param.shape):
            raise ValueError(f"adamw: {name} has the shape {tuple(tensor.shape)}; it must be {'a scalar' if name == 'grad_scale' else tuple(param.shape)}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"adamw is a step of training that has no gradient, but {name} asks for one: call it under torch.no_grad()")
    step, (beta1, beta2) = integer("step", step), betas
    if step < 1:
        raise ValueError(f"adamw: step is {step}; the first one is 1")
    beta1, beta2 = number("betas[0]", beta1), number("betas[1]", beta2)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"adamw: betas are {betas}; both must be at least 0 and less than 1")
    options = (number("learning_rate", learning_rate), beta1, beta2, number("eps", eps), number("weight_decay", weight_decay))
    return make(Call, (param, exp_avg, exp_avg_sq, grad, grad_scale, step, *options))


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: Tensor | None = None,
) -> None:
    """Change `param` and its moments by one step of AdamW, in place; the formula stands at the top of this module.

    param, grad, exp_avg, exp_avg_sq   tensors of one shape and dtype, any strides; best the flat memory of many parameters. The gradient is read only.
    step           number of this step, from 1 on: it corrects the bias of moments that began at 0.
    betas, eps, weight_decay, learning_rate   as in torch.optim.AdamW.
    grad_scale     scalar of the same dtype that the gradient is multiplied by on the way, None for 1: clipping without a pass of its own.

    Computed in the dtype of `param`. An element depends on nothing but its own: the same bits for any number of threads and however memory is cut.
    There is no gradient: raises RuntimeError where gradients are on and an argument asks for one, TypeError for a dtype and ValueError for a
    shape, a device or an option that does not fit.
    """
    op(prepare(
        param, grad, exp_avg, exp_avg_sq,
        step=step, learning_rate=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, grad_scale=grad_scale,
    ))  # fmt: skip
