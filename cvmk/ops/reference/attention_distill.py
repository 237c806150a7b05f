"""References of `attention_kl` and `flash_attention_distill`: both maps of a block of rows at a time, computed again in the backward pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs, make
from cvmk.ops._dtypes import accumulation_dtype
from cvmk.ops.attention_distill import Call, Out, maps_alone
from cvmk.ops.reference.attention import LN2, LOG2E, Mask, Part, Sums, blocks, dot, exponentials, finite, grad_scores, join, product, product_t


def distill_forward(c: Call) -> Out:
    """(out, kl, lse, teacher_lse) of `cvmk.ops.flash_attention_distill`, out None where v is; differentiable any number of times."""
    mask, wide = Mask.of(c.q, c.k, -1, 0 if c.causal else -1, c.key_lengths), _wide(c.q, c.teacher_q)
    q, k, v = mask.without_blind(c.q), mask.without_unread(c.k).contiguous(), None if c.v is None else mask.without_unread(c.v).contiguous()
    teacher_q, teacher_k = mask.without_blind(c.teacher_q.detach()), mask.without_unread(c.teacher_k.detach()).contiguous()
    groups = math.gcd(q.shape[1], teacher_q.shape[1])
    found: list[tuple[Part, list[Tensor]]] = []
    for part in blocks(q.shape[0], q.shape[2], (q.shape[1] + teacher_q.shape[1]) * k.shape[2]):
        p, total, teacher_lse = exponentials(_scores(part, teacher_q, teacher_k, mask, c.teacher_scale, wide))
        target = _mean_map(p.div_(total), groups)
        s = dot(part.of(q), part.keys(k), c.scale * LOG2E).to(wide)
        hiding = mask.hiding(part, s)
        e, total, lse = exponentials(s.clone() if hiding is None else s + hiding)
        log_target = target.clamp(min=torch.finfo(wide).tiny).log2_()
        # A hidden key has probability 0 in the target and a finite score in s, which is not masked.
        terms = (log_target + _by_group(finite(LOG2E * lse)[..., None], groups) - _by_group(s, groups)) * target
        kl = LN2 * terms.sum(-1).view(lse.shape)
        results = [kl, lse, teacher_lse]
        if v is not None:
            results.append(product(e.to(v.dtype), part.keys(v)).div_(total))
        found.append((part, results))
    dtypes = [accumulation_dtype(q.dtype)] * 2 + [accumulation_dtype(teacher_q.dtype)] + [q.dtype] * (v is not None)
    kl, lse, teacher_lse, *out = (join([(part, results[i]) for part, results in found]).to(dtype) for i, dtype in enumerate(dtypes))
    return make(Out, (out[0] if out else None, kl, lse, teacher_lse))


def distill_backward(grads: Out, c: Call, saved: Out, needs: Needs) -> tuple[Tensor | None, ...]:
    """The gradients of q, k and v by the formulas in the docstring of `cvmk.ops.flash_attention_distill`."""
    mask, wide = Mask.of(c.q, c.k, -1, 0 if c.causal else -1, c.key_lengths), _wide(c.q, c.teacher_q)
    q, k, v = mask.without_blind(c.q), mask.without_unread(c.k).contiguous(), None if c.v is None else mask.without_unread(c.v).contiguous()
    teacher_q, teacher_k = mask.without_blind(c.teacher_q), mask.without_unread(c.teacher_k).contiguous()
    grad_out = None if grads.out is None else mask.without_blind(grads.out)
    grad_kl, grad_lse = (None if g is None else mask.without_blind(g[..., None])[..., 0] for g in (grads.kl, grads.lse))
    lse2, teacher_lse2 = (finite(LOG2E * x.to(wide))[..., None] for x in (saved.lse, saved.teacher_lse))
    groups = math.gcd(q.shape[1], teacher_q.shape[1])
    sums = Sums()
    for part in blocks(q.shape[0], q.shape[2], (q.shape[1] + teacher_q.shape[1]) * k.shape[2]):
        q_part = part.of(q).contiguous()
        p = dot(q_part, part.keys(k), c.scale * LOG2E).to(wide)
        hiding = mask.hiding(part, p)
        p = (p if hiding is None else p.add_(hiding)).sub_(part.of(lse2)).exp2_()
        dp = None
        if grad_out is not None and v is not None:
            g = part.of(grad_out).contiguous()
            dp = dot(g, part.keys(v), 1.0)
            if needs.v:
                sums.add("v", part, product_t(p.to(v.dtype), g, v.shape[1]))
        pull = None
        if grad_kl is not None:
            target = _mean_map(_scores(part, teacher_q, teacher_k, mask, c.teacher_scale, wide).sub_(part.of(teacher_lse2)).exp2_(), groups)
            pull = (_by_group(p, groups) - target).mul_(_by_group(part.of(grad_kl)[..., None], groups)).view(p.shape)
        ds = grad_scores(p, dp, None if grad_lse is None else part.of(grad_lse))
        ds = (ds if pull is None else ds.add_(pull)).to(q.dtype)
        if needs.q:
            sums.add("q", part, product(ds, part.keys(k), c.scale), rows=True)
        if needs.k:
            sums.add("k", part, product_t(ds, q_part, k.shape[1], c.scale))
    dq = sums.total("q", q) if needs.q else None
    dk = sums.total("k", k) if needs.k else None
    dv = sums.total("v", v) if v is not None and needs.v else None
    return dq, dk, dv


BACKENDS = (
    Backend("attention_kl", "reference", *maps_alone(distill_forward, distill_backward)),
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
    apart: Tensor = x.unflatten(1, (groups, -1))
    return apart


def _mean_map(p: Tensor, groups: int) -> Tensor:
    """The mean of the maps of each group's heads: [b, H, rows, Tk] -> [b, groups, 1, rows, Tk]."""
    return p.unsqueeze(2) if p.shape[1] == groups else _by_group(p, groups).mean(2, keepdim=True)
