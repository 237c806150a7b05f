"""References of `attention_kl` and `flash_attention_distill`: both maps of a block of rows at a time, computed again in the backward pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cvmk.ops._dispatch import Backend, accumulation_dtype, not_needed
from cvmk.ops.reference.attention import LN2, LOG2E, Mask, Part, Sums, blocks, dot, exponentials, finite, grad_scores, join, product, product_t


def distill_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    teacher_q: Tensor,
    teacher_k: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    teacher_scale: float,
) -> tuple[Tensor, ...]:
    """(out, kl, lse, teacher_lse) of `cvmk.ops.flash_attention_distill`, without out where v is None; differentiable any number of times."""
    mask, wide = Mask.of(q, k, -1, 0 if causal else -1, key_lengths), _wide(q, teacher_q)
    q, k, v = mask.without_blind(q), mask.without_unread(k).contiguous(), None if v is None else mask.without_unread(v).contiguous()
    teacher_q, teacher_k = mask.without_blind(teacher_q.detach()), mask.without_unread(teacher_k.detach()).contiguous()
    groups = math.gcd(q.shape[1], teacher_q.shape[1])
    found: list[tuple[Part, list[Tensor]]] = []
    for part in blocks(q.shape[0], q.shape[2], (q.shape[1] + teacher_q.shape[1]) * k.shape[2]):
        p, total, teacher_lse = exponentials(_scores(part, teacher_q, teacher_k, mask, teacher_scale, wide))
        target = _mean_map(p.div_(total), groups)
        s = dot(part.of(q), part.keys(k), scale * LOG2E).to(wide)
        hiding = mask.hiding(part, s)
        e, total, lse = exponentials(s.clone() if hiding is None else s + hiding)
        log_target = target.clamp(min=torch.finfo(wide).tiny).log2_()
        # A hidden key has probability 0 in the target and a finite score in s, which is not masked.
        terms = (log_target + _by_group(finite(LOG2E * lse)[..., None], groups) - _by_group(s, groups)) * target
        kl = LN2 * terms.sum(-1).view(lse.shape)
        results = [kl, lse, teacher_lse]
        if v is not None:
            results.insert(0, product(e.to(v.dtype), part.keys(v)).div_(total))
        found.append((part, results))
    dtypes = [q.dtype] * (v is not None) + [accumulation_dtype(q.dtype)] * 2 + [accumulation_dtype(teacher_q.dtype)]
    return tuple(join([(part, results[i]) for part, results in found]).to(dtype) for i, dtype in enumerate(dtypes))


def distill_backward(
    grad_out: Tensor | None,
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    grad_teacher_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    teacher_q: Tensor,
    teacher_k: Tensor,
    key_lengths: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    teacher_lse: Tensor,
    causal: bool,
    scale: float,
    teacher_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v by the formulas in the docstring of `cvmk.ops.flash_attention_distill`."""
    mask, wide = Mask.of(q, k, -1, 0 if causal else -1, key_lengths), _wide(q, teacher_q)
    q, k, v = mask.without_blind(q), mask.without_unread(k).contiguous(), None if v is None else mask.without_unread(v).contiguous()
    teacher_q, teacher_k = mask.without_blind(teacher_q), mask.without_unread(teacher_k).contiguous()
    grad_out = None if grad_out is None else mask.without_blind(grad_out)
    grad_kl, grad_lse = (None if g is None else mask.without_blind(g[..., None])[..., 0] for g in (grad_kl, grad_lse))
    lse2, teacher_lse2 = (finite(LOG2E * x.to(wide))[..., None] for x in (lse, teacher_lse))
    groups = math.gcd(q.shape[1], teacher_q.shape[1])
    sums = Sums()
    for part in blocks(q.shape[0], q.shape[2], (q.shape[1] + teacher_q.shape[1]) * k.shape[2]):
        q_part = part.of(q).contiguous()
        p = dot(q_part, part.keys(k), scale * LOG2E).to(wide)
        hiding = mask.hiding(part, p)
        p = (p if hiding is None else p.add_(hiding)).sub_(part.of(lse2)).exp2_()
        dp = None
        if grad_out is not None and v is not None:
            g = part.of(grad_out).contiguous()
            dp = dot(g, part.keys(v), 1.0)
            if needs[2]:
                sums.add("v", part, product_t(p.to(v.dtype), g, v.shape[1]))
        pull = None
        if grad_kl is not None:
            target = _mean_map(_scores(part, teacher_q, teacher_k, mask, teacher_scale, wide).sub_(part.of(teacher_lse2)).exp2_(), groups)
            pull = (_by_group(p, groups) - target).mul_(_by_group(part.of(grad_kl)[..., None], groups)).view(p.shape)
        ds = grad_scores(p, dp, None if grad_lse is None else part.of(grad_lse))
        ds = (ds if pull is None else ds.add_(pull)).to(q.dtype)
        if needs[0]:
            sums.add("q", part, product(ds, part.keys(k), scale), rows=True)
        if needs[1]:
            sums.add("k", part, product_t(ds, q_part, k.shape[1], scale))
    dq = sums.total("q", q) if needs[0] else not_needed(q)
    dk = sums.total("k", k) if needs[1] else not_needed(k)
    dv = sums.total("v", v) if v is not None and needs[2] else not_needed(q)
    return dq, dk, dv


def kl_forward(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    teacher_scale: float,
) -> tuple[Tensor, ...]:
    """(kl, lse, teacher_lse) of `cvmk.ops.attention_kl`."""
    return distill_forward(student_q, student_k, None, teacher_q, teacher_k, key_lengths, causal, scale, teacher_scale)


def kl_backward(
    grad_kl: Tensor | None,
    grad_lse: Tensor | None,
    grad_teacher_lse: Tensor | None,
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    key_lengths: Tensor | None,
    lse: Tensor,
    teacher_lse: Tensor,
    causal: bool,
    scale: float,
    teacher_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of student_q and student_k."""
    dq, dk, _ = distill_backward(
        None, grad_kl, grad_lse, None, student_q, student_k, None, teacher_q, teacher_k, key_lengths, None, lse, teacher_lse,
        causal, scale, teacher_scale, needs,
    )  # fmt: skip
    return dq, dk


BACKENDS = (
    Backend("attention_kl", "reference", kl_forward, kl_backward),
    Backend("flash_attention_distill", "reference", distill_forward, distill_backward),
)


# -- maps ---------------------------------------------------------------------------------------------------------------------------
def _wide(q: Tensor, teacher_q: Tensor) -> torch.dtype:
    """The dtype of both sides' scores."""
    return torch.promote_types(accumulation_dtype(q.dtype), accumulation_dtype(teacher_q.dtype))


def _scores(part: Part, q: Tensor, k: Tensor, mask: Mask, scale: float, dtype: torch.dtype) -> Tensor:
    """The block's masked scores times log2(e)."""
    s = dot(part.of(q), part.keys(k), scale * LOG2E).to(dtype)
    hiding = mask.hiding(part, s)
    return s if hiding is None else s.add_(hiding)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[b, H, rows, n] -> [b, groups, H / groups, rows, n]."""
    return x.unflatten(1, (groups, -1))


def _mean_map(p: Tensor, groups: int) -> Tensor:
    """The mean of the maps of each group's heads: [b, H, rows, Tk] -> [b, groups, 1, rows, Tk]."""
    return p.unsqueeze(2) if p.shape[1] == groups else _by_group(p, groups).mean(2, keepdim=True)
