"""`attention_kl` and `flash_attention_distill`: a student's attention maps pulled to a teacher's, without ever storing a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cvmk.ops._call import Needs, make
from cvmk.ops._dtypes import accumulation_dtype, autocast_lower
from cvmk.ops._op import Op
from cvmk.ops._watch import autocast_enabled
from cvmk.ops.attention import check_lengths, check_qk, check_values, checked_scale, default_scale


def attention_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
) -> Tensor:
    """KL(P_t || P_s) of every row of the attention maps P = softmax(mask(scale q k^T)), from queries and keys alone.

    Arguments
        student_q, student_k   [B, Hs, Tq, Ds], [B, Hs_kv, Tk, Ds]: float64, float32, bfloat16 or float16, one dtype; any strides whose
                               last dimension is contiguous. Hs is a multiple of Hs_kv.
        teacher_q, teacher_k   [B, Ht, Tq, Dt], [B, Ht_kv, Tk, Dt]: likewise; head count, width and dtype may differ from the student's.
                               The teacher is a constant: it gets no gradient.
        causal, key_lengths    one mask for both, as in `flash_attention`: bottom-right by the tensors' sizes; int32 or int64 [B], keys
                               from key_lengths[b] on are neither seen nor read.
        scale, teacher_scale   factors of the products, by default 1 / sqrt(Ds) and 1 / sqrt(Dt); numbers without a gradient.

    Heads. The heads of both sides are split, in order, into gcd(Hs, Ht) groups, and each student head is compared with the mean map of
    its group's teacher heads: head by head where Hs == Ht, with the mean of Ht / Hs neighbours where that divides, one teacher head
    for Hs / Ht student heads the other way, and with the mean over all heads where the counts share no factor.

    Returns kl [B, Hs, Tq] float32 (float64 for float64 students), at least 0 but for rounding; a row that sees no key gives 0 and has
    gradient 0. The rows of padded queries count as any other: weight them with 0 in the sum.

    Gradient. With w the gradient of kl and P_t the mean map, KL = sum_j P_t (log P_t - S) + lse_s, and
        dS = w (P_s - P_t),  dq = scale dS k,  dk = scale dS^T q.
    The forward pass keeps one log-sum-exp a row and head; the backward pass computes the maps again. The reference holds a block of
    `cvmk.ops.reference.attention.BLOCK` scores of both sides together at a time (or one row of queries of one batch item).

    A NaN or an infinity in an argument reaches only what depends on it.
    Raises TypeError for a wrong dtype and for a scale that asks for a gradient, ValueError for a wrong shape or scale.
    """
    call = _prepare_kl(student_q, student_k, teacher_q, teacher_k, causal=causal, key_lengths=key_lengths, scale=scale, teacher_scale=teacher_scale)
    kl: Tensor = kl_op(call)[0]
    return kl


def flash_attention_distill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The student's attention and its distance from the teacher's maps in one pass over the student's scores.

    q [B, H, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv] are the student's, one dtype; teacher_q [B, Ht, Tq, Dt] and teacher_k
    [B, Ht_kv, Tk, Dt] are constants without a gradient. Masks, scales, heads and the law are those of `flash_attention` and
    `attention_kl`: returns (out, kl) with out = flash_attention(q, k, v, ...) [B, H, Tq, Dv] in the dtype of q and
    kl = attention_kl(q, k, teacher_q, teacher_k, ...) [B, H, Tq] float32 (float64 for float64).

    Gradient. With dO and w the gradients of out and kl, dP = dO V^T and D_i = <dO_i, O_i>, the distillation adds one term and no
    matrix product of the student's:
        dS = P_s (dP - D) + w (P_s - P_t),  dV = P_s^T dO,  dq = scale dS k,  dk = scale dS^T q.
    Forward by one more row sum c = sum_j P_t (T - S): KL = c - lse_t + lse_s where one teacher head is compared with.

    A NaN or an infinity in an argument reaches only what depends on it.
    Raises TypeError for a wrong dtype and for a scale that asks for a gradient, ValueError for a wrong shape or scale.
    """
    call = _prepare_distill(q, k, v, teacher_q, teacher_k, causal=causal, key_lengths=key_lengths, scale=scale, teacher_scale=teacher_scale)
    out, kl, _, _ = distill_op(call)
    return out, kl


# -- the ops --------------------------------------------------------------------------------------------------------------------
class KlCall(NamedTuple):
    """One call of `attention_kl`."""

    student_q: Tensor
    student_k: Tensor
    teacher_q: Tensor
    teacher_k: Tensor
    key_lengths: Tensor | None
    causal: bool
    scale: float
    teacher_scale: float


class KlOut(NamedTuple):
    kl: Tensor
    lse: Tensor
    teacher_lse: Tensor


class Call(NamedTuple):
    """One call of `flash_attention_distill`; backends see one of `attention_kl` as this one with None for v, out and its gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    teacher_q: Tensor
    teacher_k: Tensor
    key_lengths: Tensor | None
    causal: bool
    scale: float
    teacher_scale: float


class Out(NamedTuple):
    out: Tensor
    kl: Tensor
    lse: Tensor
    teacher_lse: Tensor


def _statistic(q: Tensor) -> Tensor:
    """One number a row and head."""
    return q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


def _fake_kl_forward(c: KlCall) -> KlOut:
    return KlOut(_statistic(c.student_q), _statistic(c.student_q), _statistic(c.teacher_q))


def _fake_distill_forward(c: Call) -> Out:
    return Out(c.q.new_empty((*c.q.shape[:-1], c.v.shape[-1])), _statistic(c.q), _statistic(c.q), _statistic(c.teacher_q))


kl_op = Op("attention_kl", KlCall, KlOut, fake_forward=_fake_kl_forward, differentiable=("student_q", "student_k"), saved=("lse", "teacher_lse"))
distill_op = Op(
    "flash_attention_distill", Call, Out, fake_forward=_fake_distill_forward, differentiable=("q", "k", "v"), saved=("out", "lse", "teacher_lse")
)


def maps_alone(
    forward: Callable[[Call], Out], backward: Callable[[Out, Call, Out, Needs], tuple[Tensor | None, ...]]
) -> tuple[Callable[[KlCall], KlOut], Callable[[KlOut, KlCall, KlOut, Needs], tuple[Tensor | None, ...]]]:
    """A backend's passes of `attention_kl` from its passes of `flash_attention_distill`, which compare maps without attending where v is None."""

    def call_of(c: KlCall) -> Call:
        return make(Call, (c.student_q, c.student_k, None, *c[2:]))

    def kl_forward(c: KlCall) -> KlOut:
        return make(KlOut, forward(call_of(c))[1:])

    def kl_backward(grads: KlOut, c: KlCall, saved: KlOut, needs: Needs) -> tuple[Tensor | None, ...]:
        return backward(make(Out, (None, *grads)), call_of(c), make(Out, (None, *saved)), make(distill_op.needs, (*needs, False)))[:2]

    return kl_forward, kl_backward


# -- checks ---------------------------------------------------------------------------------------------------------------------
@kl_op.prepared_by
def _prepare_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
) -> KlCall:
    width = check_qk(student_q, student_k, ("student_q", "student_k"))
    teacher_width = _check_teacher(student_q, student_k, teacher_q, teacher_k, student="student")
    if key_lengths is not None:
        check_lengths(key_lengths, student_q, "key_lengths")
    scale = default_scale(width) if scale is None else checked_scale("scale", scale, student_q.dtype)
    teacher_scale = default_scale(teacher_width) if teacher_scale is None else checked_scale("teacher_scale", teacher_scale, teacher_q.dtype)
    if autocast_enabled():
        student_q, student_k, teacher_q, teacher_k = autocast_lower(student_q, student_k, teacher_q, teacher_k)
    _check_dtypes(student_q, student_k, "student_q", "student_k")
    _check_dtypes(teacher_q, teacher_k, "teacher_q", "teacher_k")
    return make(KlCall, (student_q, student_k, teacher_q, teacher_k, key_lengths, bool(causal), scale, teacher_scale))


@distill_op.prepared_by
def _prepare_distill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
) -> Call:
    width = check_qk(q, k, ("q", "k"))
    check_values(k, v)
    teacher_width = _check_teacher(q, k, teacher_q, teacher_k, student="q and k")
    if key_lengths is not None:
        check_lengths(key_lengths, q, "key_lengths")
    scale = default_scale(width) if scale is None else checked_scale("scale", scale, q.dtype)
    teacher_scale = default_scale(teacher_width) if teacher_scale is None else checked_scale("teacher_scale", teacher_scale, teacher_q.dtype)
    if autocast_enabled():
        q, k, v, teacher_q, teacher_k = autocast_lower(q, k, v, teacher_q, teacher_k)
    _check_dtypes(q, k, "q", "k")
    _check_dtypes(q, v, "q", "v")
    _check_dtypes(teacher_q, teacher_k, "teacher_q", "teacher_k")
    return make(Call, (q, k, v, teacher_q, teacher_k, key_lengths, bool(causal), scale, teacher_scale))


def _check_teacher(q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, *, student: str) -> int:
    """A teacher that fits the student; returns the last dimension of its queries and keys."""
    width = check_qk(teacher_q, teacher_k, ("teacher_q", "teacher_k"))
    (batch, heads, rows, _), (teacher_batch, teacher_heads, teacher_rows, _), keys, teacher_keys = q.shape, teacher_q.shape, k.shape[2], teacher_k.shape[2]
    if teacher_batch != batch or teacher_rows != rows or teacher_keys != keys:
        mine, theirs = f"[{batch}, {rows}, {keys}]", f"[{teacher_batch}, {teacher_rows}, {teacher_keys}]"
        raise ValueError(f"teacher_q and teacher_k have the sizes [B, Tq, Tk] = {theirs}, {student} {mine}; they must be equal")
    if not (teacher_q.is_cpu and q.is_cpu) and teacher_q.device != q.device:
        raise ValueError(f"teacher_q must be on {q.device} as {student} is, not on {teacher_q.device}")
    if heads == 0 or teacher_heads == 0:
        raise ValueError(f"student and teacher need at least one head each, not {heads} and {teacher_heads}")
    return width


def _check_dtypes(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    if a.dtype != b.dtype:
        raise TypeError(f"{name_a} and {name_b} must have one dtype, not {a.dtype} and {b.dtype}")
