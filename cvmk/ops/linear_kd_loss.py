"""Distillation loss from hidden states: output layers, divergence and cross-entropy in one op that never makes an N x V tensor.

The value is that of `kd_loss` on student_hidden @ student_weight^T + student_bias and the teacher's logits made likewise. With
G = dloss/dlogits [N, V] (the formulas of `cvmk/ops/kd_loss.py`), made and used a chunk of rows at a time:

    dhidden = G weight,    dweight = G^T hidden,    dbias = sum of the rows of G
"""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from cvmk.ops._dispatch import Op, accumulation_dtype, autocast_dtype, autocast_lower, not_needed, unobserved
from cvmk.ops.kd_loss import LossOptions, check_options, check_target, normalizer_tensor
from cvmk.ops.native.linear_kd_loss import lowered_forward


class LinearLossOptions(LossOptions, total=False):
    """The options of `linear_kd_loss`."""

    student_bias: Tensor | None
    teacher_bias: Tensor | None


def _fake_forward(student_hidden: Tensor, student_weight: Tensor, *rest: object) -> tuple[Tensor, ...]:
    target, wanted, dtype = rest[4], rest[-1], accumulation_dtype(student_hidden.dtype)
    assert isinstance(target, Tensor) and isinstance(wanted, list | tuple)
    scalars = [student_hidden.new_empty((), dtype=dtype) for _ in range(4)]
    shapes = (student_hidden.shape, student_weight.shape, student_weight.shape[:1])
    grads = [student_hidden.new_empty(shape if want else (0,), dtype=dtype) for want, shape in zip(wanted, shapes, strict=True)]
    return *scalars, student_hidden.new_empty((5, target.numel()), dtype=dtype), *grads


def _fake_backward(*arguments: object) -> tuple[Tensor, ...]:
    needs, found = arguments[-1], []
    assert isinstance(needs, list | tuple)
    first = arguments[8]
    assert isinstance(first, Tensor)
    for x, need in zip(arguments[8:11], needs, strict=False):
        found.append(x.new_empty(x.shape) if need and isinstance(x, Tensor) else not_needed(first))
    return tuple(found)


_TENSORS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias,"
    " Tensor target, Tensor? normalizer"
)
_OPTIONS = "float temperature, float alpha, str divergence, float mixture, float label_smoothing, int ignore_index, bool[] wanted"
op = Op(
    "linear_kd_loss",
    module="linear_kd_loss",
    forward=f"({_TENSORS}, {_OPTIONS}) -> (Tensor loss, Tensor kd, Tensor ce, Tensor count, Tensor stats, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    backward="(Tensor? g_loss, Tensor? g_kd, Tensor? g_ce, Tensor? g_count, Tensor? g_stats, Tensor? g_d_hidden, Tensor? g_d_weight, Tensor? g_d_bias,"
    f" {_TENSORS}, Tensor count, Tensor stats, Tensor d_hidden, Tensor d_weight, Tensor d_bias, {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    tensors=8,
    differentiable=(0, 1, 2),
    saved=(3, 4, 5, 6, 7),
    principal="student_hidden",
)


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
) -> tuple[object, ...]:
    if (teacher_hidden is None) != (teacher_weight is None) or (teacher_bias is not None and teacher_weight is None):
        raise ValueError("give both teacher_hidden and teacher_weight (teacher_bias only with them), or none of them")
    mixing = check_options(temperature, alpha, divergence, mixture, label_smoothing, normalizer, teacher_hidden is not None)
    hidden, weight, bias, t_hidden, t_weight, t_bias = autocast_lower(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    )
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
    t_hidden, t_weight, t_bias = (x.detach() if x is not None and keep else None for x in (t_hidden, t_weight, t_bias))
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    constant = normalizer_tensor(normalizer, hidden)
    options = (float(temperature), float(alpha), divergence, mixing, float(label_smoothing), ignore_index, wanted)
    return hidden, weight, bias, t_hidden, t_weight, t_bias, target, constant, *options


class _Lowered(torch.autograd.Function):
    """Under autocast, for calls that nobody traces: float32 operands become bfloat16 on their way into the CPU library's products, and the
    gradients keep float32. Saves copies of all operands, and the gradients a rounding."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        ctx.set_materialize_grads(False)
        loss, ctx.count, ctx.found = lowered_forward(*arguments)
        ctx.save_for_backward(*arguments[: op.tensors])
        ctx.rest = arguments[op.tensors :]
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found, ctx.found = ctx.found, None  # handed on once, and the taker's then
        nothing = (None,) * (op.tensors + len(ctx.rest) - 3)
        (grad,) = grads
        if grad is None:
            return None, None, None, *nothing
        if found is None or torch.is_grad_enabled():
            return *_Lowered.again(ctx, grad), *nothing
        scale = grad / ctx.count
        return *(None if x is None else x.mul_(scale) for x in found), *nothing

    @staticmethod
    def again(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by the op on lowered operands: for a second backward pass, and for derivatives of gradients."""
        create_graph, saved = torch.is_grad_enabled(), ctx.saved_tensors
        with torch.enable_grad():
            # Views, for one tensor may stand in several places, and each needs its own derivative.
            leaves = [None if x is None else x.view_as(x) for x in saved[:6]]
            loss = op(*(None if x is None else x.bfloat16() for x in leaves), *saved[6:], *ctx.rest)[0]
            wanted = [x for x, need in zip(leaves, ctx.needs_input_grad[:3], strict=False) if x is not None and need]
            found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=create_graph))
        return tuple([next(found) if need else None for need in ctx.needs_input_grad[:3]])


def _may_lower(operands: list[Tensor | None], target: Tensor) -> bool:
    """Whether `_Lowered` may take the call, if the CPU library does."""
    if not torch.is_grad_enabled() or autocast_dtype(*operands) != torch.bfloat16 or not unobserved([*operands, target]):
        return False
    return all(x is None or x.dtype == torch.float32 for x in operands)


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
    and kept in float32, and so is the weight's gradient until all rows are in it; under autocast all operands are lowered first (by the CPU
    library on their way into the products, and the gradients of float32 operands are not rounded). A gradient that nobody needs (a frozen
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
    options: dict[str, Any] = {
        "student_bias": student_bias,
        "teacher_bias": teacher_bias,
        "temperature": temperature,
        "alpha": alpha,
        "divergence": divergence,
        "mixture": mixture,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
        "normalizer": normalizer,
        "return_parts": return_parts,
    }
    operands = (student_hidden, student_weight, teacher_hidden, teacher_weight, target)
    if not return_parts and _may_lower([*operands[:4], student_bias, teacher_bias], target):
        with torch.autocast("cpu", enabled=False):
            arguments = prepare(*operands, **options)
        if op.choose("forward", arguments).name == "native":
            return _Lowered.apply(*arguments)
    loss, kd, ce = op(*prepare(*operands, **options))[:3]
    return (loss, kd, ce) if return_parts else loss
