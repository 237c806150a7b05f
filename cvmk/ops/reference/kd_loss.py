"""Reference of `kd_loss`: rows in chunks that fit the cache, no copy of the logits, one N x V tensor in all: the gradient.

`row_losses` and `row_gradients` hold the formulas (derived in `cvmk/ops/kd_loss.py`); `linear_kd_loss` uses them too. Both have a
`masked` form that is right where logits are -inf, and a quicker one that gives NaN or inf there. On the CPU the quick one runs first
and a chunk with a result that is not finite is done again; elsewhere, and where autograd records, the masked one always runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvmk.ops._backend import Backend
from cvmk.ops._call import Needs, make
from cvmk.ops._dtypes import accumulation_dtype, not_needed
from cvmk.ops.kd_loss import Call, Loss, Losses, Out, ScaleCall, row_dtype

Rows = slice | Tensor
CPU_CHUNK, GPU_CHUNK = 2**16, 2**25
"""Logits of a chunk. On the CPU the five or so temporaries of a chunk stay in the second-level cache."""


class Terms(NamedTuple):
    """What a row's loss is made of."""

    temperature: float
    divergence: str
    mixture: float
    smoothing: float

    @staticmethod
    def of(c: Loss) -> Terms:
        return Terms(c.temperature, c.divergence, c.mixture, c.label_smoothing)


# -- formulas, [n, V] logits in the accumulation dtype ----------------------------------------------------------------------------
def _log_sum_exp(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row-wise exp(x - maximum) [n, V], its sum [n, 1], and the log-sum-exp [n, 1]."""
    top = x.detach().amax(-1, keepdim=True)
    powers = (x - top).exp_()
    total = powers.sum(-1, keepdim=True)
    return powers, total, top + total.log()


def _zero_where(values: Tensor, condition: Tensor | None) -> Tensor:
    return values if condition is None else values.masked_fill(condition, 0.0)


def _mixture(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """weight * p + (1 - weight) * q, never 0, so that its logarithm and 1/m exist where both are 0."""
    return torch.lerp(q, p, weight).clamp(min=torch.finfo(p.dtype).tiny)


def _divergence(w: Tensor, u: Tensor, divergence: str, mixture: float, masked: bool) -> tuple[Tensor, ...]:
    """D(softmax(w), softmax(u)), both log-sum-exps, and the row reduction that the gradient needs; each [n, 1]."""
    powers_q, total_q, lse_q = _log_sum_exp(u)
    powers_p, total_p, lse_p = _log_sum_exp(w)
    if divergence == "forward_kl":
        difference = _zero_where(w - u, powers_p == 0 if masked else None)
        value = (powers_p * difference).sum(-1, keepdim=True) / total_p - lse_p + lse_q
        return value, lse_q, lse_p, torch.zeros_like(value)
    log_p, log_q, p, q = w - lse_p, u - lse_q, powers_p / total_p, powers_q / total_q
    no_p, no_q = (p == 0, q == 0) if masked else (None, None)
    if divergence == "reverse_kl":
        value = (q * _zero_where(log_q - log_p, no_q)).sum(-1, keepdim=True)
        return value, lse_q, lse_p, value
    if divergence == "js":
        log_m = _mixture(p, q, mixture).log()
        of_q = (1 - mixture) * (q * _zero_where(log_q - log_m, no_q)).sum(-1, keepdim=True)
        return mixture * (p * _zero_where(log_p - log_m, no_p)).sum(-1, keepdim=True) + of_q, lse_q, lse_p, of_q
    if divergence == "skew_kl":
        m = _mixture(p, q, mixture)
        value = (p * _zero_where(log_p - m.log(), no_p)).sum(-1, keepdim=True)
        return value, lse_q, lse_p, (mixture - 1) * (q * (p / m)).sum(-1, keepdim=True)
    m = _mixture(q, p, mixture)
    value = (q * _zero_where(log_q - m.log(), no_q)).sum(-1, keepdim=True)
    return value, lse_q, lse_p, value + 1 - mixture * (q * (q / m)).sum(-1, keepdim=True)


def _slope(log_p: Tensor, log_q: Tensor, q: Tensor, divergence: str, mixture: float, masked: bool) -> Tensor:
    """dD/dq [n, V] but for a constant a row; forward KL has its own formula."""
    if divergence == "reverse_kl":
        return _zero_where(log_q - log_p, q == 0 if masked else None)
    p = log_p.exp()
    if divergence == "js":
        return _zero_where(log_q - _mixture(p, q, mixture).log_(), q == 0 if masked else None).mul_(1 - mixture)
    if divergence == "skew_kl":
        return p.div_(_mixture(p, q, mixture)).mul_(mixture - 1)
    m = _mixture(q, p, mixture)
    return _zero_where(log_q - m.log(), q == 0 if masked else None).add_(1).sub_(q / m, alpha=mixture)


def row_losses(z: Tensor, t: Tensor | None, y: Tensor, terms: Terms, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence [n] (without T^2), cross-entropy [n] and statistics [5, n] of student z, teacher t [n, V] and targets y [n]."""
    temperature, divergence, mixture, smoothing = terms
    if t is None:
        lse = lse_q = _log_sum_exp(z)[2]
        kd = lse_p = reduction = torch.zeros_like(lse)
    elif temperature == 1:
        kd, lse_q, lse_p, reduction = _divergence(t, z, divergence, mixture, masked)
        lse = lse_q
    else:
        kd, lse_q, lse_p, reduction = _divergence(t / temperature, z / temperature, divergence, mixture, masked)
        lse = _log_sum_exp(z)[2]
    ce = lse - (1 - smoothing) * z.gather(1, y.unsqueeze(1))
    count = torch.zeros_like(ce)
    if smoothing:
        absent = z == -torch.inf if masked else None
        count = count + z.shape[1] if absent is None else z.shape[1] - absent.sum(-1, keepdim=True).to(z.dtype)
        ce = ce - _zero_where(z, absent).sum(-1, keepdim=True) * (smoothing / count)
    return kd.squeeze(1), ce.squeeze(1), torch.cat([lse, lse_q, lse_p, reduction, count], 1).detach().t()


def row_gradients(
    z: Tensor,
    t: Tensor | None,
    y: Tensor,
    stats: Tensor,
    kd_scale: Tensor | None,
    ce_scale: Tensor | None,
    terms: Terms,
    masked: bool,
    out: Tensor | None = None,
) -> Tensor:
    """kd_scale * q (g - sum q g), g = dD/dq, plus ce_scale * dCE/dz: [n, V], in `out` where it is given. Scales have no dimension."""
    temperature, divergence, mixture, smoothing = terms
    lse, lse_q, lse_p, reduction, count = stats.unsqueeze(-1)
    grad: Tensor | None = None
    if kd_scale is not None:
        assert t is not None
        at_one = temperature == 1
        log_p = t - lse_p if at_one else (t / temperature).sub_(lse_p)
        log_q = torch.sub(z, lse_q, out=out) if at_one else torch.div(z, temperature, out=out).sub_(lse_q)
        if divergence == "forward_kl":
            grad = log_q.exp_().mul_(kd_scale + ce_scale if at_one and ce_scale is not None else kd_scale)
            grad.addcmul_(log_p.exp_(), kd_scale, value=-1)
        else:
            q = log_q.exp()
            slope = _slope(log_p, log_q, q, divergence, mixture, masked).sub_(reduction).mul_(kd_scale)
            grad = torch.mul(q, slope.add_(ce_scale) if at_one and ce_scale is not None else slope, out=out)
    if ce_scale is None:
        assert grad is not None
        return grad
    if grad is None:
        grad = torch.sub(z, lse, out=out).exp_().mul_(ce_scale)
    elif temperature != 1:
        grad.addcmul_((z - lse).exp_(), ce_scale)
    grad.scatter_add_(1, y.unsqueeze(1), ((smoothing - 1) * ce_scale).expand(y.shape[0], 1))
    if smoothing:
        grad.sub_(ce_scale * smoothing / count)
        if masked:
            grad.masked_fill_(z == -torch.inf, 0.0)
    return grad


# -- chunks of rows ---------------------------------------------------------------------------------------------------------------
def row_chunks(valid: Tensor, size: int) -> Iterator[tuple[Rows, Tensor | None]]:
    """Chunks of at most `size` rows that together cover the valid rows [N], and which rows of a chunk to blank.

    On the CPU a chunk holds valid rows only: a slice where all are, else their indices. On other devices, where looking would wait for
    the device, chunks are slices and the mask [n, 1] names the rows to blank.
    """
    count, cpu = valid.shape[0], valid.device.type == "cpu"
    if cpu and not bool(valid.all()):
        for rows in valid.nonzero().squeeze(1).split(size):
            if rows.numel():
                yield rows, None
        return
    for start in range(0, count, size):
        chunk = slice(start, min(start + size, count))
        yield chunk, None if cpu else ~valid[chunk].unsqueeze(1)


def _chunk_size(logits: Tensor, recorded: bool) -> int:
    """Rows of a chunk of logits [N, V]; where autograd records all of them, for it keeps the temporaries anyhow."""
    return max(1, logits.shape[0] if recorded else (CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK) // logits.shape[1])


def valid_targets(target: Tensor, ignore_index: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Targets [N], int64, 0 where they are ignored, and which ones are not.

    On the CPU, where looking costs nothing, a target outside of the vocabulary is a ValueError.
    """
    y = target.reshape(-1)
    valid = y != ignore_index
    if y.device.type == "cpu":
        wrong = valid & ((y < 0) | (y >= vocabulary))
        if bool(wrong.any()):
            raise ValueError(f"target holds {int(y[wrong][0])}, which is neither in the vocabulary 0..{vocabulary - 1} nor ignore_index ({ignore_index})")
    return torch.where(valid, y, 0).long(), valid


def take(x: Tensor, rows: Rows, blank: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of x [N, n] in the dtype, blanked ones 0 (they may hold NaN)."""
    part = (x[rows] if isinstance(rows, slice) else x.index_select(0, rows)).to(dtype)
    return part if blank is None else part.masked_fill(blank, 0.0)


def put(into: Tensor, rows: Rows, part: Tensor, blank: Tensor | None) -> None:
    """Write the rows of `into` [N, n], blanked ones 0."""
    part = (part if blank is None else part.masked_fill(blank, 0.0)).to(into.dtype)
    if isinstance(rows, slice):
        into[rows] = part
    else:
        into.index_copy_(0, rows, part)


def quick_first(x: Tensor, recorded: bool) -> bool:
    """Whether to try the form without masks first; to see whether it did would wait for other devices than the CPU."""
    return x.device.type == "cpu" and not recorded


def checked_losses(z: Tensor, t: Tensor | None, y: Tensor, terms: Terms, recorded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`row_losses`, quick where that is right."""
    if quick_first(z, recorded):
        kd, ce, stats = row_losses(z, t, y, terms, masked=False)
        if bool((kd + ce).isfinite().all()):
            return kd, ce, stats
    return row_losses(z, t, y, terms, masked=True)


def checked_gradients(
    z: Tensor, t: Tensor | None, y: Tensor, stats: Tensor, kd_scale: Tensor | None, ce_scale: Tensor | None, terms: Terms, out: Tensor | None = None
) -> Tensor:
    """`row_gradients`, quick where that is right."""
    if quick_first(z, False) and not (terms.smoothing and bool((stats[4] < z.shape[1]).any())):
        grad = row_gradients(z, t, y, stats, kd_scale, ce_scale, terms, masked=False, out=out)
        if terms.divergence == "forward_kl" or kd_scale is None or bool(grad.sum(-1).isfinite().all()):
            return grad
    return row_gradients(z, t, y, stats, kd_scale, ce_scale, terms, masked=True, out=out)


def combine(kd: Tensor, ce: Tensor, alpha: float) -> Tensor:
    """alpha * kd + (1 - alpha) * ce; a part of weight 0 is left out, for it may be infinite."""
    if alpha == 0:
        return ce * 1.0
    return kd * 1.0 if alpha == 1 else alpha * kd + (1 - alpha) * ce


def totals(values: list[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of the rows' values of all chunks."""
    return torch.cat(values).sum() if values else like.new_zeros((), dtype=dtype)


def scales(
    g_loss: Tensor | None, g_kd: Tensor | None, g_ce: Tensor | None, has_teacher: bool, alpha: float, temperature: float
) -> tuple[Tensor | None, Tensor | None]:
    """What a row's divergence slope and cross-entropy gradient are multiplied by, before the normaliser; None where by nothing."""
    kd = [] if g_loss is None or alpha == 0 else [alpha * g_loss]
    ce = [] if g_loss is None or alpha == 1 else [(1 - alpha) * g_loss]
    kd += [] if g_kd is None else [g_kd]
    ce += [] if g_ce is None else [g_ce]
    return temperature * sum(kd[1:], kd[0]) if kd and has_teacher else None, sum(ce[1:], ce[0]) if ce else None


def forward(c: Call) -> Out:
    terms = Terms.of(c)
    recorded = torch.is_grad_enabled() and c.student.requires_grad
    dtype, vocabulary = row_dtype(c, c.student.dtype), c.student.shape[-1]
    y, valid = valid_targets(c.target, c.ignore_index, vocabulary)
    z = c.student.reshape(-1, vocabulary)
    t = None if c.teacher is None else c.teacher.reshape(-1, vocabulary)
    stats = z.new_zeros((5, y.shape[0]), dtype=dtype)
    kd_rows, ce_rows = [], []
    for rows, blank in row_chunks(valid, _chunk_size(z, recorded)):
        teacher_part = None if t is None else take(t, rows, blank, dtype)
        kd, ce, some = checked_losses(take(z, rows, blank, dtype), teacher_part, y[rows], terms, recorded)
        stats[:, rows] = some
        kd_rows.append(kd if blank is None else kd.masked_fill(blank.squeeze(1), 0.0))
        ce_rows.append(ce if blank is None else ce.masked_fill(blank.squeeze(1), 0.0))
    count = (valid.sum().clamp(min=1) if c.normalizer is None else c.normalizer).to(dtype, copy=True)
    kd, ce = c.temperature**2 * totals(kd_rows, z, dtype) / count, totals(ce_rows, z, dtype) / count
    result = accumulation_dtype(c.student.dtype)
    return Out(combine(kd, ce, c.alpha).to(result), kd.to(result), ce.to(result), count.to(result), stats)


def backward(grads: Out, c: Call, saved: Out, needs: Needs) -> Tensor | None:
    return gradient(grads, c, saved) if needs.student else None


def gradient(grads: Any, c: Call, saved: Out) -> Tensor:
    """The gradient of the student's logits."""
    dtype, vocabulary = row_dtype(c, c.student.dtype), c.student.shape[-1]
    kd_scale, ce_scale = scales(grads.loss, grads.kd, grads.ce, c.teacher is not None, c.alpha, c.temperature)
    if kd_scale is None and ce_scale is None:
        return torch.zeros_like(c.student, memory_format=torch.contiguous_format)
    kd_scale = None if kd_scale is None else kd_scale / saved.divisor
    ce_scale = None if ce_scale is None else ce_scale / saved.divisor
    z = c.student.reshape(-1, vocabulary)
    t = None if c.teacher is None else c.teacher.reshape(-1, vocabulary)
    y, valid = valid_targets(c.target, c.ignore_index, vocabulary)
    complete = y.device.type == "cpu" and bool(valid.all())
    grad = c.student.new_empty(z.shape)
    if y.device.type == "cpu" and not complete:
        grad.index_fill_(0, (~valid).nonzero().squeeze(1), 0.0)
    for rows, blank in row_chunks(valid, _chunk_size(z, False)):
        part = take(z, rows, blank, dtype)
        teacher_part = None if t is None or kd_scale is None else take(t, rows, blank, dtype)
        direct = grad[rows] if complete and grad.dtype == dtype else None
        some = checked_gradients(part, teacher_part, y[rows], saved.stats[:, rows], kd_scale, ce_scale, Terms.of(c), out=direct)
        if direct is None:
            put(grad, rows, some, blank)
    return grad.view(c.student.shape)


def in_place(c: Call) -> Losses:
    out = forward(c)
    c.student.copy_(gradient(make(Out, (torch.ones_like(out.loss), None, None, None, None)), c, out))
    return Losses(*out[:3])


def scale(c: ScaleCall) -> Tensor:
    """Multiply the gradient with the incoming one, in place."""
    if not c.gradient.is_cpu or c.factor.item() != 1:
        c.gradient.mul_(c.factor)
    return not_needed(c.gradient)


BACKENDS = (
    Backend("kd_loss", "reference", forward, backward),
    Backend("kd_loss_in_place", "reference", in_place),
    Backend("kd_loss_scale", "reference", scale),
)
