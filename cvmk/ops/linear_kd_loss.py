"""Distillation loss from hidden states: output layers, divergence and cross-entropy in one op that never makes an N x V tensor.

The value is that of `kd_loss` on student_hidden @ student_weight^T + student_bias and the teacher's logits made likewise. With
G = dloss/dlogits [N, V] (the formulas of `cvmk/ops/kd_loss.py`), made and used a chunk of rows at a time:

    dhidden = G weight,    dweight = G^T hidden,    dbias = sum of the rows of G
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from cvmk.ops._call import Needs, integer, number
from cvmk.ops._dtypes import accumulation_dtype, autocast_dtype, autocast_lower
from cvmk.ops._op import Op
from cvmk.ops.kd_loss import LossOptions, check_options, check_target, constant, normalizer_tensor, row_dtype


class LinearLossOptions(LossOptions, total=False):
    """The options of `linear_kd_loss`."""

    student_bias: Tensor | None
    teacher_bias: Tensor | None


class Call(NamedTuple):
    student_hidden: Tensor  # [..., Ds]
    student_weight: Tensor  # [V, Ds]
    student_bias: Tensor | None  # [V]
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    target: Tensor  # [...]
    normalizer: Tensor | None
    temperature: float
    alpha: float
    divergence: str
    mixture: float
    label_smoothing: float
    ignore_index: int
    wanted: list[bool]  # gradients of the student's operands that the forward pass makes
    lowered: bool  # autocast: float32 operands are rounded to bfloat16 on their way into the products, and their gradients keep float32


class Out(NamedTuple):
    loss: Tensor
    kd: Tensor
    ce: Tensor
    divisor: Tensor
    stats: Tensor  # as in `kd_loss`
    d_hidden: Tensor  # gradients of the loss times the divisor, in the accumulation dtype; without elements where they are not wanted
    d_weight: Tensor
    d_bias: Tensor


def _fake_forward(c: Call) -> Out:
    hidden, dtype = c.student_hidden, accumulation_dtype(c.student_hidden.dtype)
    loss, kd, ce, count = (hidden.new_empty((), dtype=dtype) for _ in range(4))
    shapes = (hidden.shape, c.student_weight.shape, c.student_weight.shape[:1])
    grads = [hidden.new_empty(shape if want else (0,), dtype=dtype) for want, shape in zip(c.wanted, shapes, strict=True)]
    return Out(loss, kd, ce, count, hidden.new_empty((5, c.target.numel()), dtype=row_dtype(c, hidden.dtype)), *grads)


op = Op(
    "linear_kd_loss",
    Call,
    Out,
    fake_forward=_fake_forward,
    differentiable=("student_hidden", "student_weight", "student_bias"),
    saved=("divisor", "stats", "d_hidden", "d_weight", "d_bias"),
)


def lowered(c: Call) -> Call:
    """The call on operands that were rounded where it asks for that."""
    if not c.lowered:
        return c
    return c._replace(
        student_hidden=c.student_hidden.bfloat16(),
        student_weight=c.student_weight.bfloat16(),
        **{name: x.bfloat16() for name in _OPTIONAL if (x := getattr(c, name)) is not None},
        lowered=False,
    )


_OPTIONAL = ("student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")


def needed_of(c: Call, needs: Needs) -> list[bool]:
    """Which of the student's operands are there and need a gradient."""
    return [needs.student_hidden, needs.student_weight, needs.student_bias and c.student_bias is not None]


def loss_scale(grads: Out, saved: Out) -> Tensor | None:
    """What the gradients of the loss times the divisor are multiplied by; None where a part is differentiated too."""
    return grads.loss / saved.divisor if grads.loss is not None and grads.kd is None and grads.ce is None else None


def kept(c: Call, saved: Out, needed: list[bool]) -> bool:
    """Whether the forward pass kept every gradient that is needed (what was handed on is gone)."""
    sizes = (c.student_hidden.numel(), c.student_weight.numel(), c.student_weight.shape[0])
    return all(have.numel() == size or not need for need, have, size in zip(needed, saved[5:8], sizes, strict=True))


def _check_side(who: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{who}_{name} must be floating-point, got {tensor.dtype}")
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{who}_{name} is {tensor.dtype}, but {who}_hidden is {hidden.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{who}_{name} is on {tensor.device}, but {who}_hidden on {hidden.device}")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"{who}_hidden must be [..., D] and {who}_weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"{who}_bias must be [V] with V = {weight.shape[0]}, got {tuple(bias.shape)}")


@op.prepared_by
def prepare(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    target: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    divergence: str = "forward_kl",
    mixture: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    return_parts: bool = False,
) -> Call:
    temperature, alpha, label_smoothing = number("temperature", temperature), number("alpha", alpha), number("label_smoothing", label_smoothing)
    if (teacher_hidden is None) != (teacher_weight is None) or (teacher_bias is not None and teacher_weight is None):
        raise ValueError("give both teacher_hidden and teacher_weight (teacher_bias only with them), or none of them")
    mixing = check_options(temperature, alpha, divergence, mixture, label_smoothing, normalizer, teacher_hidden is not None)
    operands: tuple[Tensor | None, ...] = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    # Rounding on the way saves copies of all operands, and the gradients a rounding.
    lower = autocast_dtype(*operands) == torch.bfloat16 and all(x is None or x.dtype == torch.float32 for x in operands)
    hidden, weight, bias, t_hidden, t_weight, t_bias = operands if lower else autocast_lower(*operands)
    assert hidden is not None and weight is not None
    _check_side("student", hidden, weight, bias)
    check_target(target, hidden.shape[:-1], hidden.device, "student_hidden")
    if t_hidden is not None and t_weight is not None:
        _check_side("teacher", t_hidden, t_weight, t_bias)
        if t_weight.shape[0] != weight.shape[0]:
            raise ValueError(f"the teacher's vocabulary has {t_weight.shape[0]} entries and the student's {weight.shape[0]}; they must be one")
        if t_hidden.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(f"teacher_hidden has the rows {tuple(t_hidden.shape[:-1])}, but student_hidden {tuple(hidden.shape[:-1])}")
        if t_hidden.device != hidden.device:
            raise ValueError(f"teacher_hidden is on {t_hidden.device}, but student_hidden on {hidden.device}")
    keep = alpha != 0 or return_parts
    t_hidden, t_weight, t_bias = (constant(x) if x is not None and keep else None for x in (t_hidden, t_weight, t_bias))
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    divisor = None if normalizer is None else normalizer_tensor(normalizer, hidden)
    options = (temperature, alpha, divergence, mixing, label_smoothing, integer("ignore_index", ignore_index))
    return Call(hidden, weight, bias, t_hidden, t_weight, t_bias, target, divisor, *options, wanted, lower)


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    target: Tensor,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[LinearLossOptions],
) -> Tensor: ...


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    target: Tensor,
    *,
    return_parts: Literal[True],
    **options: Unpack[LinearLossOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    target: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    divergence: str = "forward_kl",
    mixture: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`kd_loss` of the logits student_hidden @ student_weight^T + student_bias and teacher_hidden @ teacher_weight^T + teacher_bias.

    student_hidden   [..., Ds], float64, float32, bfloat16 or float16.
    student_weight   [V, Ds] and student_bias [V] or None, of the same dtype.
    teacher_hidden   [..., Dt], teacher_weight [V, Dt], teacher_bias [V] or None, of one floating dtype; None only where alpha is 0.
                     Constants: the teacher gets no gradient.
    target           [...], int64 or int32. Rows with `ignore_index` count nothing and are not read: they may hold NaN.

    The other arguments, the value and the treatment of -inf (in a bias) are those of `ops.kd_loss`. Half-precision products are summed
    and kept in float32, and so is the weight's gradient until all rows are in it. Under autocast to bfloat16 float32 operands are rounded on their
    way into the products, and their gradients are not; otherwise operands are cast first, as for matrix products. A gradient that nobody needs (a frozen
    weight) is not computed.

    Memory: with n = max(2^20 / V, 64) rows a chunk on the CPU and max(2^25 / V, 1024) elsewhere (Triton: max(2^26 / V, 2048)), temporaries
    are a handful of [n, V] tensors, the gradients in float32, and for half precision on the CPU float32 copies of the weights: nothing
    of N x V as long as N > n. Second derivatives are the exception: they hold the logits.

    Returns a scalar, float32 (float64 for float64), or (loss, T^2 * D, CE) with `return_parts`; differentiating a part makes the logits
    once more in the backward pass.

    A NaN or an infinity in an argument reaches only what depends on it.
    Raises ValueError for shapes or vocabularies that differ (naming both), options out of range, and, on the CPU, a target outside of
    the vocabulary; TypeError for wrong or mixed dtypes.
    """
    call = prepare(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        target,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        temperature=temperature,
        alpha=alpha,
        divergence=divergence,
        mixture=mixture,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=normalizer,
        return_parts=return_parts,
    )
    loss, kd, ce = op(call)[:3]
    return (loss, kd, ce) if return_parts else loss
