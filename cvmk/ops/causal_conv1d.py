"""The short causal convolution that stands before a selective scan (Gu and Dao, arXiv 2312.00752, section 3.4): a filter of its own for each
channel, over the present input and the few before it; whole sequences, and one step at a time.

With width W and p = initial_state (or zeros) followed by x along the length:

    pre_t = bias + sum_{k<W} weight_k p_{t+k}        out_t = pre_t, or silu(pre_t) = pre_t sigmoid(pre_t)
    last_state = p_L ... p_{L+W-2}                    the last W - 1 inputs

Gradients, with g that of out, G that of last_state, s = sigmoid(pre) and d_t = g_t, or g_t s_t (1 + pre_t (1 - s_t)):

    dp_j = sum_k weight_k d_{j-k} + G_{j-L}           (terms outside their tensors are 0)
    dweight_k = sum_{b,t} d_t p_{t+k}                 dbias = sum_{b,t} d_t
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvmk.ops._call import Written, make
from cvmk.ops._dtypes import autocast_lower
from cvmk.ops._op import Op
from cvmk.ops._watch import autocast_enabled

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = (None, "silu")


class ConvCall(NamedTuple):
    """Where channels are last, x is [batch, length, dim]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    lengths: Tensor | None
    silu: bool
    channels_last: bool
    reverse: bool


class ConvOut(NamedTuple):
    out: Tensor
    last_state: Tensor


class UpdateCall(NamedTuple):
    state: Written
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    silu: bool


class UpdateOut(NamedTuple):
    y: Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    return_last_state: bool = False,
    channels_last: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own filter of the present and the W - 1 inputs before it; formulas and gradients stand at the top of this module.

    x              [batch, dim, length] float64, float32, bfloat16 or float16, in any strides: its dtype is the results'.
    weight         [dim, W], any floating dtype, W of at least 1; weight[:, W - 1] is of the present input.
    bias           [dim], any floating dtype.
    activation     None or "silu".
    initial_state  [batch, dim, W - 1]: the inputs before the first, oldest first, any floating dtype.
    lengths        [batch], int32 or int64, on x's device: of row b only the first lengths[b] inputs are real. The others count as 0 whatever they are,
                   as do the results there, and the row's last state is that behind its last real input. Below 0 is 0, above `length` is `length`.
    channels_last  x and out are [batch, length, dim], as linear layers give and take them: the same results, without a transposition on the CPU.
    reverse        from the last real input of each row to its first: the result equals that of inputs whose real part is flipped, flipped. The initial
                   state enters there, and the last state is that after position 0.

    Returns out [batch, dim, length] and, with return_last_state, (out, last state [batch, dim, W - 1]), which goes on as initial_state or by
    `causal_conv1d_update`. Sums are in float32 (float64 for float64). Every floating tensor has a gradient, through the last state too. Under autocast x
    is cast as the operand of a product is.

    Raises TypeError for a dtype and ValueError for a shape, a device or an activation that does not fit.
    """
    out, last_state = conv_op(
        _prepare(
            x,
            weight,
            bias,
            activation=activation,
            initial_state=initial_state,
            lengths=lengths,
            return_last_state=return_last_state,
            channels_last=channels_last,
            reverse=reverse,
        )
    )
    return (out, last_state) if return_last_state else out


def causal_conv1d_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """Advance the convolution by one input: `state` loses its oldest one and takes x in; y is returned.

    state          [batch, dim, W - 1], any floating dtype and strides, oldest input first.
    x              [batch, dim]; weight [dim, W], bias [dim] and activation as in `causal_conv1d`, to which this is equal step by step.

    Returns y [batch, dim] in x's dtype. There is no gradient: it is a step of inference. Raises RuntimeError if gradients are on and an argument asks for
    one, TypeError for a dtype and ValueError for a shape, a device or an activation that does not fit.
    """
    y: Tensor = update_op(_prepare_update(state, x, weight, bias, activation=activation))
    return y


# -- whole sequences -----------------------------------------------------------------------------------------------------------
def _fake(c: ConvCall) -> ConvOut:
    batch, dim = c.x.shape[0], c.weight.shape[0]
    return ConvOut(c.x.new_empty(c.x.shape), c.x.new_empty((batch, dim, c.weight.shape[1] - 1)))


conv_op = Op("causal_conv1d", ConvCall, ConvOut, fake_forward=_fake, differentiable=("x", "weight", "bias", "initial_state"))


@conv_op.prepared_by
def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    return_last_state: bool = False,
    channels_last: bool = False,
    reverse: bool = False,
) -> ConvCall:
    if x.dim() != 3:
        raise ValueError(f"x must be {'[batch, length, dim]' if channels_last else '[batch, dim, length]'}, not of shape {list(x.shape)}")
    batch, dim = x.shape[0], x.shape[2 if channels_last else 1]
    _check("causal_conv1d", x, dim, weight, bias, activation)
    if initial_state is not None:
        _check_state("initial_state", initial_state, x, (batch, dim, weight.shape[1] - 1))
    if lengths is not None:
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths must be int32 or int64, not {lengths.dtype}")
        if lengths.shape != (batch,):
            raise ValueError(f"lengths must be [batch], here [{batch}], not of shape {list(lengths.shape)}")
        if lengths.device != x.device:
            raise ValueError(f"lengths is on {lengths.device}, and x on {x.device}: move it there")
    if autocast_enabled():
        (x,) = autocast_lower(x)
    return make(ConvCall, (x, weight, bias, initial_state, lengths, activation == "silu", channels_last, reverse))


# -- one input -----------------------------------------------------------------------------------------------------------------
update_op = Op("causal_conv1d_update", UpdateCall, UpdateOut, fake_forward=lambda c: UpdateOut(c.x.new_empty(c.x.shape)), principal="x")


@update_op.prepared_by
def _prepare_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> UpdateCall:
    if x.dim() != 2:
        raise ValueError(f"x must be [batch, dim], not of shape {list(x.shape)}")
    _check("causal_conv1d_update", x, x.shape[1], weight, bias, activation)
    _check_state("state", state, x, (*x.shape, weight.shape[1] - 1))
    if torch.is_grad_enabled():
        for name, tensor in (("state", state), ("x", x), ("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(f"causal_conv1d_update has no gradient, but {name} requires one; call it under torch.no_grad() or detach {name}")
    if autocast_enabled():
        (x,) = autocast_lower(x)
    return make(UpdateCall, (state, x, weight, bias, activation == "silu"))


# -- checks --------------------------------------------------------------------------------------------------------------------
def _check(op: str, x: Tensor, dim: int, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise TypeError(f"{op} needs float64, float32, bfloat16 or float16, but {name} is {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, and x on {x.device}: move it there")
    if weight.dim() != 2 or weight.shape[0] != dim or weight.shape[1] < 1:
        raise ValueError(f"weight must be [dim, width] with dim {dim} as x has it and a width of at least 1, not of shape {list(weight.shape)}")
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"bias must be [dim], here [{dim}], not of shape {list(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'silu', not {activation!r}")


def _check_state(name: str, state: Tensor, x: Tensor, shape: Any) -> None:
    if state.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {state.dtype}")
    if state.shape != shape:
        raise ValueError(f"{name} must be [batch, dim, width - 1], here {list(shape)}, not of shape {list(state.shape)}")
    if state.device != x.device:
        raise ValueError(f"{name} is on {state.device}, and x on {x.device}: move it there")
