"""Distillation loss of rows of logits: statistics and losses in one launch, the gradient in another or, for rows in the L2 cache, the same.

`kd_rows`, one program a row, sweeps over the row in tiles [R, C]:

    1  running maxima and sums of exponentials of both sides, and the sum of the divergence where one sweep is enough (forward and
       reverse KL, for they are sums of e (a - b)); every thread keeps its own maximum, so no warp waits for another before the row's
       end, and a rescaling is paid once for the entries that a thread has in a tile
    2  js and the skew divergences, which need both log-sum-exps first: their sums
    3  where GRADIENT, the gradient

Sweeps change direction, so that each begins with what the one before read last: a row pair that does not fit in the L2 cache with the
others in flight is read again only in part. `kd_gradient` makes the gradient of logits that left the cache, one program a row and block.

Limit, bfloat16 logits of N rows and V entries: 2 * 2 N V bytes forward, 3 * 2 N V bytes backward; 3 * 2 N V in all where `kd_rows` makes
the gradient and the rows in flight (one or two a multiprocessor) stay in the L2 cache. An entry costs two exponentials
forward (three where the temperature is neither 1 nor 2) and about 20 other instructions: 4.3 TB/s bring 1.1e12 entries a second, for
which 132 multiprocessors need 60 % of their exponentials and 80 % of their instructions, so that memory stays the limit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvmk.ops.triton.kernels.common import INTERPRETED, cast

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
ABSENT = tl.constexpr(-1e4)
"""Binary logarithm of a probability that is 0."""
STEEP = tl.constexpr(115.0)
"""Binary logarithm of a ratio of probabilities that counts as infinite."""
FORWARD_KL, REVERSE_KL, JS, SKEW_KL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def logits(row, bias, columns, end, other: tl.constexpr):
    """Logits at `columns` of the row at `row` in float32, `other` from column `end` on."""
    x = tl.load(row + columns, mask=columns < end, other=other).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + columns, mask=columns < end, other=0.0).to(tl.float32)
    return x


@triton.jit
def by_lane(x, VEC: tl.constexpr):
    """A tile [R, C] as [R, lanes, VEC]: what one thread has loaded lies in one lane."""
    return tl.reshape(x, [x.shape[0], x.shape[1] // VEC, VEC])


@triton.jit
def lane_sum(x):
    """Sum of [R, lanes, VEC] over what a lane has."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def ln(x):
    """Natural logarithm with an absolute error of 2e-7 near 1 and a relative one elsewhere: one instruction of the special units."""
    if INTERPRETED:
        return tl.log(x)
    return LN2 * tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rescaled(value, factor):
    """value * factor; 0 where the factor is, whatever the value."""
    return tl.where(factor == 0.0, 0.0, value * factor)


@triton.jit
def ratios(x, y, scale, at_x, at_y, weight):
    """What the mixed divergences are made of, for student x and teacher y: p, q, ln(p / q), p / q and m / q with m = weight p + (1 - weight) q.

    scale is log2(e) / T, and at_x and at_y are T times the log-sum-exps of both. Everything is finite for logits of -inf.
    """
    log_q = tl.maximum((x - at_x) * scale, ABSENT, propagate_nan=tl.PropagateNan.ALL)
    log_p = tl.maximum((y - at_y) * scale, ABSENT, propagate_nan=tl.PropagateNan.ALL)
    log_ratio = tl.minimum(tl.maximum(log_p - log_q, -STEEP, propagate_nan=tl.PropagateNan.ALL), STEEP, propagate_nan=tl.PropagateNan.ALL)
    ratio = tl.exp2(log_ratio)
    return tl.exp2(log_p), tl.exp2(log_q), log_ratio * LN2, ratio, weight * ratio + (1.0 - weight)


@triton.jit
def mixed_slope(ratio, mixed, weight, DIVERGENCE: tl.constexpr):
    """dD/dq of js and the skew divergences from p / q and m / q; weight is that of p in m."""
    if DIVERGENCE == JS:
        return (weight - 1.0) * ln(mixed)
    if DIVERGENCE == SKEW_KL:
        return (weight - 1.0) * (ratio / mixed)
    return 1.0 - ln(mixed) - (1.0 - weight) / mixed


@triton.jit
def mixed_term(p, q, log_ratio, slope, mixed, weight, DIVERGENCE: tl.constexpr):
    """What an entry adds to js or a skew divergence."""
    if DIVERGENCE == JS:
        return weight * p * (log_ratio - ln(mixed)) + q * slope
    if DIVERGENCE == SKEW_KL:
        return p * (log_ratio - ln(mixed))
    return -q * ln(mixed)


@triton.jit
def gradient_of(
    x, y, columns, target, lse, lse_q, lse_p, reduction, count, kd_scale, ce_scale, temperature, weight, smoothing,
    DIVERGENCE: tl.constexpr, KD: tl.constexpr, CE: tl.constexpr, AT_ONE: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """kd_scale * q (g - sum q g) + ce_scale * dCE/dz of one row's entries, from the row's statistics."""
    grad = tl.zeros_like(x)
    scale = LOG2E / temperature
    if KD:
        if DIVERGENCE <= REVERSE_KL:
            q = tl.exp2((x - lse_q * temperature) * scale)
            if DIVERGENCE == FORWARD_KL:
                grad = q - tl.exp2((y - lse_p * temperature) * scale)
            else:
                grad = tl.where(q == 0.0, 0.0, q * ((x - y) / temperature - (lse_q - lse_p) - reduction))
        else:
            _, q, _, ratio, mixed = ratios(x, y, scale, lse_q * temperature, lse_p * temperature, weight)
            grad = q * (mixed_slope(ratio, mixed, weight, DIVERGENCE) - reduction)
        grad *= kd_scale
    if CE:
        if KD and AT_ONE:
            slope = q
        else:
            slope = tl.exp2((x - lse) * LOG2E)
        slope -= tl.where(columns == target, 1.0 - smoothing, 0.0)
        if SMOOTHING:
            slope -= tl.where(x == -INF, 0.0, smoothing / count)
        grad += ce_scale * slope
    return grad


@triton.jit
def scales(g_loss, g_kd, g_ce, count, temperature, alpha):
    """What a row's divergence slope and cross-entropy gradient are multiplied by; a gradient of the loss that is not given is 1, a part's 0."""
    of_loss = 1.0
    if g_loss is not None:
        of_loss = tl.load(g_loss)
    elif g_kd is not None or g_ce is not None:
        of_loss = 0.0
    kd = alpha * of_loss
    ce = (1.0 - alpha) * of_loss
    if g_kd is not None:
        kd += tl.load(g_kd)
    if g_ce is not None:
        ce += tl.load(g_ce)
    if count is not None:
        divisor = tl.load(count)
        kd = kd / divisor
        ce = ce / divisor
    return kd * temperature, ce


@triton.jit
def kd_rows(
    student, teacher, student_bias, teacher_bias, target, stats, losses, gradient, g_loss, g_kd, g_ce, count,
    vocabulary, student_stride, teacher_stride, gradient_stride, stats_stride, ignore_index, temperature, alpha, weight, smoothing,
    DIVERGENCE: tl.constexpr, TEACHER: tl.constexpr, KD: tl.constexpr, CE: tl.constexpr, GRADIENT: tl.constexpr,
    AT_ONE: tl.constexpr, SQUARE: tl.constexpr, SMOOTHING: tl.constexpr, R: tl.constexpr, C: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Statistics [5] and losses [2] of a row, each `stats_stride` apart, and where GRADIENT its gradient.

    Grid [N]. student, teacher [N, V] with rows student_stride, teacher_stride apart, and biases [V] or None. AT_ONE: the temperature is
    1; SQUARE: it is 2. KD and CE: which parts the gradient has. `gradient` may be the student's logits themselves, with their dtype.
    """
    row = tl.program_id(0)
    y = tl.load(target + row)
    valid = y != ignore_index
    end = tl.where(valid, vocabulary, 0)
    student += row.to(tl.int64) * student_stride
    if TEACHER:
        teacher += row.to(tl.int64) * teacher_stride
    # Before all else, for the gradient may be written over the student's logits.
    there = valid & (y >= 0) & (y < vocabulary)
    x_y = tl.load(student + y, mask=there, other=float("nan")).to(tl.float32)
    if student_bias is not None:
        x_y += tl.load(student_bias + y, mask=there, other=0.0).to(tl.float32)
    tile = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tiles = tl.cdiv(end, R * C)
    scale = LOG2E / temperature

    LANES: tl.constexpr = C // VEC
    top, total, total_q = tl.full([LANES], -INF, tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    top_p, total_p, sum_kd = tl.full([LANES], -INF, tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    sum_x, sum_count = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for i in range(0, tiles):
        columns = i * (R * C) + tile
        x = by_lane(logits(student, student_bias, columns, end, -INF), VEC)
        if TEACHER:
            t = by_lane(logits(teacher, teacher_bias, columns, end, -INF), VEC)
        new = tl.maximum(top, lane_max(x))
        base = tl.where(new == -INF, 0.0, new)
        shifted, moved = x - base[None, :, None], top - base
        e_q, factor_q = tl.exp2(shifted * scale), tl.exp2(moved * scale)
        if not AT_ONE:
            if SQUARE:
                e, factor = e_q * e_q, factor_q * factor_q
            else:
                e, factor = tl.exp2(shifted * LOG2E), tl.exp2(moved * LOG2E)
            total = total * factor + lane_sum(e)
        total_q = total_q * factor_q + lane_sum(e_q)
        top = new
        if TEACHER:
            new_p = tl.maximum(top_p, lane_max(t))
            base_p = tl.where(new_p == -INF, 0.0, new_p)
            e_p, factor_p = tl.exp2((t - base_p[None, :, None]) * scale), tl.exp2((top_p - base_p) * scale)
            total_p = total_p * factor_p + lane_sum(e_p)
            top_p = new_p
            if DIVERGENCE == FORWARD_KL:
                sum_kd = rescaled(sum_kd, factor_p) + lane_sum(tl.where(e_p == 0.0, 0.0, e_p * (t - x)))
            elif DIVERGENCE == REVERSE_KL:
                sum_kd = rescaled(sum_kd, factor_q) + lane_sum(tl.where(e_q == 0.0, 0.0, e_q * (x - t)))
        if SMOOTHING:
            present = x != -INF  # no entry from `end` on is
            sum_x += lane_sum(tl.where(present, x, 0.0))
            sum_count += lane_sum(present.to(tl.float32))

    # The lanes' maxima and sums become the row's.
    row_top = tl.max(top, 0)
    shrink = tl.where(top == -INF, 0.0, tl.exp2((top - row_top) * scale))
    all_q = tl.sum(total_q * shrink, 0)
    lse_q = row_top / temperature + tl.log(all_q)
    lse = lse_q
    if not AT_ONE:
        lse = row_top + tl.log(tl.sum(tl.where(top == -INF, 0.0, total * tl.exp2((top - row_top) * LOG2E)), 0))
    kd, lse_p, reduction = 0.0, 0.0, 0.0
    if TEACHER:
        row_top_p = tl.max(top_p, 0)
        shrink_p = tl.where(top_p == -INF, 0.0, tl.exp2((top_p - row_top_p) * scale))
        all_p = tl.sum(total_p * shrink_p, 0)
        lse_p = row_top_p / temperature + tl.log(all_p)
        if DIVERGENCE == FORWARD_KL:
            kd = tl.sum(rescaled(sum_kd, shrink_p), 0) / (all_p * temperature) - lse_p + lse_q
        elif DIVERGENCE == REVERSE_KL:
            kd = tl.sum(rescaled(sum_kd, shrink), 0) / (all_q * temperature) - lse_q + lse_p
            reduction = kd
        else:
            sum_slope = tl.zeros([LANES], tl.float32)
            for i in range(0, tiles):
                columns = (tiles - 1 - i) * (R * C) + tile
                x = logits(student, student_bias, columns, end, -INF)
                t = logits(teacher, teacher_bias, columns, end, -INF)
                p, q, log_ratio, ratio, mixed = ratios(x, t, scale, lse_q * temperature, lse_p * temperature, weight)
                slope = mixed_slope(ratio, mixed, weight, DIVERGENCE)
                sum_kd += lane_sum(by_lane(mixed_term(p, q, log_ratio, slope, mixed, weight, DIVERGENCE), VEC))
                sum_slope += lane_sum(by_lane(q * slope, VEC))
            kd, reduction = tl.sum(sum_kd, 0), tl.sum(sum_slope, 0)

    ce = lse - (1.0 - smoothing) * x_y
    entries = 0.0
    if SMOOTHING:
        entries = tl.sum(sum_count, 0)
        ce -= tl.sum(sum_x, 0) * (smoothing / entries)
    tl.store(stats + row, tl.where(valid, lse, 0.0))
    tl.store(stats + stats_stride + row, tl.where(valid, lse_q, 0.0))
    tl.store(stats + 2 * stats_stride + row, tl.where(valid, lse_p, 0.0))
    tl.store(stats + 3 * stats_stride + row, tl.where(valid, reduction, 0.0))
    tl.store(stats + 4 * stats_stride + row, tl.where(valid, entries, 0.0))
    tl.store(losses + row, tl.where(valid, kd, 0.0))
    tl.store(losses + stats_stride + row, tl.where(valid, ce, 0.0))

    if GRADIENT:
        gradient += row.to(tl.int64) * gradient_stride
        kd_scale, ce_scale = scales(g_loss, g_kd, g_ce, count, temperature, alpha)
        every = tl.cdiv(vocabulary, R * C)
        for i in range(0, every):
            at = every - 1 - i
            if TEACHER and DIVERGENCE > REVERSE_KL:
                at = i
            columns = at * (R * C) + tile
            x = logits(student, student_bias, columns, end, -INF)
            t = x
            if KD:
                t = logits(teacher, teacher_bias, columns, end, -INF)
            grad = gradient_of(
                x, t, columns, y, lse, lse_q, lse_p, reduction, entries, kd_scale, ce_scale, temperature, weight, smoothing,
                DIVERGENCE, KD, CE, AT_ONE, SMOOTHING,
            )  # fmt: skip
            grad = tl.where(valid, grad, 0.0)
            tl.store(gradient + columns, cast(grad, gradient.dtype.element_ty), mask=columns < vocabulary)


@triton.jit
def kd_gradient(
    student, teacher, target, stats, gradient, g_loss, g_kd, g_ce, count,
    blocks, vocabulary, student_stride, teacher_stride, stats_stride, ignore_index, temperature, alpha, weight, smoothing,
    DIVERGENCE: tl.constexpr, KD: tl.constexpr, CE: tl.constexpr, AT_ONE: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient [N, V] of logits whose statistics are known. Grid [N * blocks]: a program has BLOCK entries of a row."""
    row = tl.program_id(0) // blocks
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(target + row)
    valid = y != ignore_index
    end = tl.where(valid, vocabulary, 0)
    x = logits(student + row.to(tl.int64) * student_stride, None, columns, end, 0.0)
    t = x
    if KD:
        t = logits(teacher + row.to(tl.int64) * teacher_stride, None, columns, end, 0.0)
    lse = tl.load(stats + row)
    lse_q = tl.load(stats + stats_stride + row)
    lse_p = tl.load(stats + 2 * stats_stride + row)
    reduction = tl.load(stats + 3 * stats_stride + row)
    entries = tl.load(stats + 4 * stats_stride + row)
    kd_scale, ce_scale = scales(g_loss, g_kd, g_ce, count, temperature, alpha)
    grad = gradient_of(
        x, t, columns, y, lse, lse_q, lse_p, reduction, entries, kd_scale, ce_scale, temperature, weight, smoothing, DIVERGENCE, KD, CE, AT_ONE, SMOOTHING
    )
    grad = tl.where(valid, grad, 0.0)
    at = gradient + row.to(tl.int64) * vocabulary + columns
    tl.store(at, cast(grad, gradient.dtype.element_ty), mask=columns < vocabulary)


@triton.jit
def kd_scale(gradient, factor, blocks, vocabulary, stride, BLOCK: tl.constexpr):
    """gradient [N, V] times the number `factor`, in place; nothing is read or written where that is 1. Grid [N * blocks], as `kd_gradient`."""
    by = tl.load(factor)
    if by != 1.0:
        row = tl.program_id(0) // blocks
        columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        at = gradient + row.to(tl.int64) * stride + columns
        x = tl.load(at, mask=columns < vocabulary, other=0.0).to(tl.float32)
        tl.store(at, cast(x * by, gradient.dtype.element_ty), mask=columns < vocabulary)


@triton.jit
def kd_total(
    losses, target, normalizer, loss, kd, ce, count, rows, stats_stride, ignore_index, temperature, alpha,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, parts and normaliser from the rows' losses [2, N]. Grid [1]; PART: 0 where alpha is 0, 1 where it is 1, else 2."""
    sum_kd, sum_ce, counted = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < rows
        sum_kd += tl.load(losses + index, mask=inside, other=0.0)
        sum_ce += tl.load(losses + stats_stride + index, mask=inside, other=0.0)
        counted += (tl.load(target + index, mask=inside, other=ignore_index) != ignore_index).to(tl.int32)
    if normalizer is not None:
        divisor = tl.load(normalizer)
    else:
        divisor = tl.maximum(tl.sum(counted, 0), 1).to(tl.float32)
    of_kd = temperature * temperature * tl.sum(sum_kd, 0) / divisor
    of_ce = tl.sum(sum_ce, 0) / divisor
    if PART == 0:
        tl.store(loss, of_ce)
    elif PART == 1:
        tl.store(loss, of_kd)
    else:
        tl.store(loss, alpha * of_kd + (1.0 - alpha) * of_ce)
    tl.store(kd, of_kd)
    tl.store(ce, of_ce)
    tl.store(count, divisor)
