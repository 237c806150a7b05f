"""Distillation loss on logits: a divergence from the teacher, at a temperature, and cross-entropy with the references, in one op.

With student logits z, teacher logits t, q = softmax(z / T), p = softmax(t / T), one row:

    loss = alpha * T^2 * D(p, q) + (1 - alpha) * CE(z, y)

    forward_kl       D = KL(p || q)                                                  Hinton et al. 2015
    reverse_kl       D = KL(q || p)                                                  Gu et al. 2024 (MiniLLM)
    js               D = b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q     Agarwal et al. 2024 (GKD)
    skew_kl          D = KL(p || m),  m = l p + (1 - l) q                            Ko et al. 2024 (DistiLLM)
    skew_reverse_kl  D = KL(q || m),  m = (1 - l) p + l q                            Ko et al. 2024 (DistiLLM)

    CE = lse(z) - (1 - e) z_y - (e / V') sum_v z_v     (label smoothing e over the V' entries that are not -inf)

Gradient. Since dq_v/dz_w = q_v (1[v = w] - q_w) / T, with g = dD/dq:  T^2 dD/dz = T q (g - R),  R = sum_v q_v g_v:

    forward_kl       g = -p / q: T (q - p), no reduction needed
    reverse_kl       g = log q - log p (+ 1, which cancels),       R = D
    js               g = (1 - b) (log q - log m),                  R = (1 - b) KL(q || m)
    skew_kl          g = -(1 - l) p / m,                           R = sum q g
    skew_reverse_kl  g = log q - log m + 1 - l q / m,              R = D + 1 - l sum q^2 / m
    CE               softmax(z) - (1 - e) 1[v = y] - e / V'

So the statistics lse(z), lse(z / T), lse(t / T), R and V' of each row are all that the backward pass needs besides the logits.

A row's gradient is cheapest right after its loss, while its logits are in the cache. Outside of a graph the CPU library makes it then, for
an incoming gradient of 1, and the backward pass hands it on, multiplied where the incoming one is another; `in_place` writes it over the
student's logits. Whatever else is asked of the backward pass (the gradient of a part, a second time, a second derivative) is made from the
logits, except in place, where they are gone.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, TypedDict, Unpack, overload

import torch
from torch import Tensor

from cvmk.ops._autograd import below
from cvmk.ops._backend import allowed, allowing
from cvmk.ops._call import Written, integer, make, number, written
from cvmk.ops._dtypes import accumulation_dtype, not_needed
from cvmk.ops._op import Op
from cvmk.ops._storage import with_memory

DIVERGENCES = {"forward_kl": 0.0, "reverse_kl": 0.0, "js": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}
"""The divergences and the default of their mixing weight; 0 where they have none."""
COLDEST, COLD, HOTTEST = 2.0**-1000, 2.0**-64, 2.0**20
"""Below COLD, logits divided by the temperature may be past float32, and all is computed in float64. Below COLDEST they are past that too, and above
HOTTEST float64 keeps less than four digits of the divergence: such temperatures are refused."""
HOT = 32.0
"""Above this temperature the two distributions are so near that float32 sums lose the divergence's digits (2^-24 T^2 / variance of the logits): the
reference computes in float64 and keeps its statistics so, and the fused kernels decline."""
NUMBERS = {name: number for number, name in enumerate(DIVERGENCES)}
"""The divergences as the kernels number them."""
_INTEGERS = (torch.int64, torch.int32)


class LossOptions(TypedDict, total=False):
    """The options that `kd_loss` and `linear_kd_loss` share; described at `kd_loss`."""

    temperature: float
    alpha: float
    divergence: str
    mixture: float | None
    label_smoothing: float
    ignore_index: int
    normalizer: Tensor | float | None


class LogitsLossOptions(LossOptions, total=False):
    """The options of `kd_loss`."""

    in_place: bool


class Loss(Protocol):
    """The options of a call of either loss."""

    @property
    def temperature(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def divergence(self) -> str: ...
    @property
    def mixture(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def ignore_index(self) -> int: ...


class Call(NamedTuple):
    student: Tensor  # [..., V]
    teacher: Tensor | None
    target: Tensor  # [...]
    normalizer: Tensor | None  # one number in the accumulation dtype; None: the number of rows that count
    temperature: float
    alpha: float
    divergence: str
    mixture: float
    label_smoothing: float
    ignore_index: int


class Out(NamedTuple):
    loss: Tensor
    kd: Tensor  # T^2 D
    ce: Tensor
    divisor: Tensor  # the normaliser
    stats: Tensor  # [5, N]: lse(z), lse(z / T), lse(t / T), R and V' of each row


def _fake_forward(c: Call) -> Out:
    loss, kd, ce, divisor = (c.student.new_empty((), dtype=accumulation_dtype(c.student.dtype)) for _ in range(4))
    return Out(loss, kd, ce, divisor, c.student.new_empty((5, c.target.numel()), dtype=row_dtype(c, c.student.dtype)))


def row_dtype(c: Loss, dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is computed of a row of logits, and of its statistics."""
    return accumulation_dtype(dtype) if COLD <= c.temperature <= HOT else torch.float64


def heat(c: Loss) -> list[str]:
    """Why a kernel with sums in float32 does not take a call."""
    if c.temperature > HOT:
        return [f"at the temperature {c.temperature:g}, above {HOT:g}, sums in float32 lose the divergence's digits"]
    if c.temperature < COLD:
        return [f"at the temperature {c.temperature:g}, below {COLD:.0e}, logits divided by it may be past float32"]
    return []


op = Op("kd_loss", Call, Out, fake_forward=_fake_forward, differentiable=("student",), saved=("divisor", "stats"))


# -- what backends share ------------------------------------------------------------------------------------------------------------
@overload
def matrix(x: Tensor) -> Tensor: ...
@overload
def matrix(x: None) -> None: ...
def matrix(x: Tensor | None) -> Tensor | None:
    """[N, n] with a contiguous last dimension, as kernels read it."""
    if x is None:
        return None
    rows = x if x.dim() == 2 else with_memory(x).reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else with_memory(rows).contiguous()


def vector(target: Tensor) -> Tensor:
    """[N], contiguous."""
    return target if target.dim() == 1 and target.is_contiguous() else with_memory(target).reshape(-1).contiguous()


def kernel_options(c: Loss) -> tuple[int, float, int, float, float, float]:
    """The options of a loss as the C++ libraries take them."""
    return c.ignore_index, c.alpha, NUMBERS[c.divergence], c.temperature, c.mixture, c.label_smoothing


# -- in place ---------------------------------------------------------------------------------------------------------------------
InPlaceCall = written(Call, "InPlaceCall", "student")


class Losses(NamedTuple):
    loss: Tensor
    kd: Tensor
    ce: Tensor


class ScaleCall(NamedTuple):
    gradient: Written  # [..., V]
    factor: Tensor  # one number


class Scaled(NamedTuple):
    nothing: Tensor


def _fake_in_place(c: Call) -> Losses:
    loss, kd, ce = (c.student.new_empty((), dtype=accumulation_dtype(c.student.dtype)) for _ in range(3))
    return Losses(loss, kd, ce)


def _in_place_function(op: Op) -> type[torch.autograd.Function]:
    class InPlace(torch.autograd.Function):
        """The student's logits become their gradient, which the backward pass hands on."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            loss, kd, ce = op.run_written(arguments) if keyset is None else below(op._forward, keyset, arguments)
            ctx.mark_non_differentiable(kd, ce)
            ctx.save_for_backward(arguments[0])
            ctx.allowed = allowed()
            return loss, kd, ce

        @staticmethod
        def backward(ctx: Any, g_loss: Tensor, *_: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError("kd_loss with in_place has no second derivative, for the logits are gone: leave in_place out")
            (student,) = ctx.saved_tensors
            gradient = student.detach()  # its version counter goes on: a second backward pass is an error, for the taker may write to it
            with allowing(ctx.allowed):
                scale_op(ScaleCall(gradient, g_loss))
            return None, gradient, *(None,) * (len(op.fields) - 1)

    return InPlace


in_place_op = Op("kd_loss_in_place", InPlaceCall, Losses, fake_forward=_fake_in_place, function=_in_place_function)
"""`kd_loss` whose forward pass leaves the gradient of the loss by itself in `student`."""
scale_op = Op("kd_loss_scale", ScaleCall, Scaled, fake_forward=lambda c: Scaled(not_needed(c.gradient)))
"""Multiplies that gradient with the incoming one, in place."""


def check_options(
    temperature: float, alpha: float, divergence: str, mixture: float | None, label_smoothing: float, normalizer: Tensor | float | None, has_teacher: bool
) -> float:
    """The options that both losses share: ValueError where one is out of its range; returns the mixing weight."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if not COLDEST <= temperature <= HOTTEST:
        raise ValueError(f"temperature must be positive and finite, from {COLDEST:.0e} to {HOTTEST:.0e} (float64 holds no more), got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0..1, got {alpha}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in 0..1, 1 excluded, got {label_smoothing}")
    if not has_teacher and alpha != 0:
        raise ValueError(f"without a teacher alpha must be 0, got {alpha}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must hold one number, got shape {tuple(normalizer.shape)}")
    elif normalizer is not None and not normalizer > 0:
        raise ValueError(f"normalizer must be positive, got {normalizer}")
    if mixture is None:
        return DIVERGENCES[divergence]
    mixture = number("mixture", mixture)
    if DIVERGENCES[divergence] == 0:
        raise ValueError(f"the divergence {divergence} takes no mixture, got {mixture}")
    if not 0 < mixture < 1:
        raise ValueError(f"mixture must lie between 0 and 1, both excluded, got {mixture}")
    return mixture


def check_target(target: Tensor, shape: torch.Size, device: torch.device, what: str) -> None:
    """ValueError or TypeError unless target holds integers, one a row of `shape`, on the device."""
    if target.dtype not in _INTEGERS:
        raise TypeError(f"target must be int64 or int32, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target has shape {tuple(target.shape)}, but {what} has the rows {tuple(shape)}")
    if target.device != device:
        raise ValueError(f"target is on {target.device}, but {what} is on {device}")


def normalizer_tensor(normalizer: Tensor | float, like: Tensor) -> Tensor:
    """The normaliser as a constant without dimension in the accumulation dtype, on the device of `like`."""
    dtype = accumulation_dtype(like.dtype)
    if isinstance(normalizer, Tensor):
        return normalizer.detach().reshape(()).to(device=like.device, dtype=dtype)
    return like.new_full((), float(normalizer), dtype=dtype)


def constant(tensor: Tensor) -> Tensor:
    """The tensor without its graph, which no gradient is to run through."""
    return tensor.detach() if tensor.requires_grad else tensor


def overwrites(student: Tensor) -> bool:
    """Whether in_place means anything: a gradient is asked for."""
    return torch.is_grad_enabled() and student.requires_grad


def check_in_place(student: Tensor) -> None:
    """ValueError unless logits that ask for a gradient can be overwritten by it."""
    base = None if torch.compiler.is_compiling() else student._base
    if student.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError("in_place writes over student_logits, which must not be a leaf that requires a gradient, nor a view of one: leave in_place out")
    rows = student.shape[-1]
    try:
        flat = student.detach().view(-1, rows)
    except RuntimeError:
        flat = student.detach()[..., :0]
    if flat.shape[-1] != rows or flat.stride(-1) != 1 or (flat.shape[0] > 1 and flat.stride(0) < rows):
        raise ValueError(
            f"in_place needs rows of student_logits that lie at one distance, got shape {tuple(student.shape)} with strides {student.stride()}:"
            " call contiguous() on them or leave in_place out"
        )


@op.prepared_by
@in_place_op.prepared_by
def prepare(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 0.5,
    divergence: str = "forward_kl",
    mixture: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    return_parts: bool = False,
    in_place: bool = False,
) -> Call:
    temperature, alpha, label_smoothing = number("temperature", temperature), number("alpha", alpha), number("label_smoothing", label_smoothing)
    weight = check_options(temperature, alpha, divergence, mixture, label_smoothing, normalizer, teacher_logits is not None)
    shape, device = student_logits.shape, student_logits.device
    if not student_logits.is_floating_point():
        raise TypeError(f"student_logits must be floating-point, got {student_logits.dtype}")
    if len(shape) < 1 or shape[-1] < 1:
        raise ValueError(f"student_logits must be [..., V] with V of at least 1, got shape {tuple(shape)}")
    check_target(target, shape[:-1], device, "student_logits")
    if teacher_logits is not None:
        if not teacher_logits.is_floating_point():
            raise TypeError(f"teacher_logits must be floating-point, got {teacher_logits.dtype}")
        if teacher_logits.shape != shape:
            if teacher_logits.dim() and teacher_logits.shape[-1] != shape[-1]:
                raise ValueError(f"the teacher's vocabulary has {teacher_logits.shape[-1]} entries and the student's {shape[-1]}; they must be one")
            raise ValueError(f"teacher_logits have shape {tuple(teacher_logits.shape)}, but student_logits {tuple(shape)}")
        if teacher_logits.device != device:
            raise ValueError(f"teacher_logits are on {teacher_logits.device}, but student_logits on {device}")
        teacher_logits = constant(teacher_logits) if alpha != 0 or return_parts else None
    if in_place and overwrites(student_logits):
        check_in_place(student_logits)
    divisor = None if normalizer is None else normalizer_tensor(normalizer, student_logits)
    ignore_index = integer("ignore_index", ignore_index)
    fields = (student_logits, teacher_logits, target, divisor, temperature, alpha, divergence, weight, label_smoothing, ignore_index)
    return make(Call, fields)


@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor, *, return_parts: Literal[False] = False, **options: Unpack[LogitsLossOptions]
) -> Tensor: ...


@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, target: Tensor, *, return_parts: Literal[True], **options: Unpack[LogitsLossOptions]
) -> tuple[Tensor, Tensor, Tensor]: ...


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 0.5,
    divergence: str = "forward_kl",
    mixture: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    normalizer: Tensor | float | None = None,
    return_parts: bool = False,
    in_place: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """(alpha * T^2 * D(teacher, student) + (1 - alpha) * CE) summed over the rows whose target counts, over the normaliser.

    student_logits   [..., V], float64, float32, bfloat16 or float16; everything is computed in float32 (float64 for float64).
    teacher_logits   [..., V], any floating dtype, or None where alpha is 0. A constant: the teacher gets no gradient.
    target           [...], int64 or int32. Rows with `ignore_index` count nothing and are not read: they may hold NaN.
    temperature      T > 0 of both distributions, at most 2^20; cross-entropy is always at 1. Above 32 only the reference is exact enough: it runs, in
                     float64.
    divergence       "forward_kl", "reverse_kl", "js", "skew_kl" or "skew_reverse_kl" (formulas: the module's docstring).
    mixture          mixing weight of js (0.5) and of the skew divergences (0.1).
    label_smoothing  e: the target distribution is (1 - e) of the reference and e shared by the entries that are not -inf in the student
                     (all of them in most models: then it is that of torch.nn.functional.cross_entropy).
    normalizer       what the sum is divided by: a number, a tensor of one element (a constant: no gradient), or None for the number of
                     rows that count, at least 1. Give the global count for gradient accumulation and data parallelism.
    return_parts     return (loss, T^2 * D, CE), both parts summed and divided likewise, without alpha; each can be differentiated.
    in_place         where a gradient is asked for, write it over the student's logits: no tensor of their size is made, and on a GPU they
                     are read and written once. The logits are lost then, also for whoever looks at them later (take the argmax before),
                     and an operation that saved them for its backward pass raises PyTorch's usual error there; the parts cannot be
                     differentiated, nor the loss twice. They must not be a leaf, nor a view of one, and their rows must lie at one distance
                     (a contiguous tensor's do) and apart from the teacher's. The gradient is rounded to their dtype before the incoming one multiplies it: in
                     float16 put a loss scale into the normalizer.

    Returns a scalar, float32 (float64 for float64). The gradient has the dtype of student_logits.

    Masked entries, whose logit is -inf in the student, the teacher or both, follow 0 log 0 = 0; an entry whose probability underflows to 0
    counts as masked. Forward KL is inf where the teacher has mass and the student has none, reverse KL in the opposite case,
    cross-entropy where the target is masked; js and the skew divergences stay finite. The gradient of an infinite loss is undefined.

    Under autocast the logits are taken as they are, for the arithmetic is that of float32 anyhow.

    A NaN or an infinity in an argument reaches only what depends on it.
    Raises ValueError for shapes or vocabularies that differ (naming both), options out of range, and, on the CPU, a target outside of
    the vocabulary; TypeError for wrong dtypes.
    """
    call = prepare(
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        alpha=alpha,
        divergence=divergence,
        mixture=mixture,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=normalizer,
        return_parts=return_parts,
        in_place=in_place,
    )
    loss, kd, ce = in_place_op(call) if in_place and overwrites(student_logits) else op(call)[:3]
    return (loss, kd, ce) if return_parts else loss
