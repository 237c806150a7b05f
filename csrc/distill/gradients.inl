// The gradient of one row of logits, from its statistics. Formulas: cvmk/ops/kd_loss.py.
#pragma once

#include "distill/losses.inl"

namespace cvmk::distill {
namespace {

// What a row's gradient is made of besides the logits.
struct Slope {
  float inverse, lse, lse_q, lse_p, reduction, mixture;
  float kd_scale, ce_scale;
  float ce_square;  // ce_scale * c with softmax(z) = c softmax(z / 2)^2
  float shared;     // ce_scale * smoothing / V', taken from every entry that is not -inf
  float at_target;  // ce_scale * (1 - smoothing), taken from the target's
};

// kd_scale q (g - R). W holds the row's kd_scale and reduction, or vectors of those of several rows.
template <int kDivergence, typename W>
CVMK_INLINE F divergence_gradient(const W& w, F log_q, F log_p, F q, F p) {
  if (kDivergence == kForwardKl) return (q - p) * w.kd_scale;
  F slope{};
  if (kDivergence == kReverseKl) slope = zero_where(q == F{}, log_q - log_p);
  if (kDivergence == kJs) slope = zero_where(q == F{}, log_q - simd::log(mix(p, q, w.mixture))) * (1 - w.mixture);
  if (kDivergence == kSkewKl) slope = p / mix(p, q, w.mixture) * (w.mixture - 1);
  if (kDivergence == kSkewReverseKl) {
    const F mixed = mix(q, p, w.mixture);
    slope = zero_where(q == F{}, log_q - simd::log(mixed)) + 1.0f - q / mixed * w.mixture;
  }
  return q * ((slope - w.reduction) * w.kd_scale);
}

// Without kKd no teacher is read.
template <int kTemperature, int kDivergence, bool kKd, bool kCe, typename S, typename T, typename O>
__attribute__((noinline)) void write_gradient(const Slope& slope, int64_t vocabulary, const S& s, const T& t, int64_t y, const O& out) {
  const Slope w = slope;
  const F low = simd::set(-__builtin_inff());
  vectors_from(out.head(vocabulary), vocabulary, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) {
    s.prefetch(i + kAhead);
    if (kKd) t.prefetch(i + kAhead);
    const F z = s.load(i, n, kind);
    F grad{};
    if (kKd) {
      const F log_q = z * w.inverse - w.lse_q, log_p = t.load(i, n, kind) * w.inverse - w.lse_p;
      const F q = exp_below(log_q), p = exp_below(log_p);
      grad = divergence_gradient<kDivergence>(w, log_q, log_p, q, p);
      if (kCe && kTemperature == kAtOne) grad += q * w.ce_scale;
      if (kCe && kTemperature == kAtTwo) grad += q * q * w.ce_square;
    }
    if (kCe) {
      if (!kKd || kTemperature == kAtAny) grad += exp_below(z - w.lse) * w.ce_scale;
      if (w.shared != 0) grad -= zero_where(z == low, simd::set(w.shared));
      if (static_cast<uint64_t>(y - i) < static_cast<uint64_t>(kLanes)) grad -= zero_where(lanes() != simd::seti(static_cast<int>(y - i)), simd::set(w.at_target));
    }
    out.store(i, n, grad, kind);
  });
}

template <bool kCe, typename S, typename T, typename O>
CVMK_INLINE void write_both(const Terms& terms, const Slope& slope, int64_t vocabulary, const S& s, const T& t, int64_t y, const O& out) {
  switch (terms.divergence) {
    case kReverseKl: return write_gradient<kAtAny, kReverseKl, true, kCe>(slope, vocabulary, s, t, y, out);
    case kJs: return write_gradient<kAtAny, kJs, true, kCe>(slope, vocabulary, s, t, y, out);
    case kSkewKl: return write_gradient<kAtAny, kSkewKl, true, kCe>(slope, vocabulary, s, t, y, out);
    case kSkewReverseKl: return write_gradient<kAtAny, kSkewReverseKl, true, kCe>(slope, vocabulary, s, t, y, out);
    default: break;
  }
  if (terms.temperature == 1.0f) return write_gradient<kAtOne, kForwardKl, true, kCe>(slope, vocabulary, s, t, y, out);
  if (terms.temperature == 2.0f) return write_gradient<kAtTwo, kForwardKl, true, kCe>(slope, vocabulary, s, t, y, out);
  write_gradient<kAtAny, kForwardKl, true, kCe>(slope, vocabulary, s, t, y, out);
}

// Which parts a gradient has and what they are multiplied by; at least one.
struct Parts {
  bool with_kd, with_ce;
  float kd_scale, ce_scale;
};

// The row's gradient to `out`; its statistics are at stats[0], stats[step], ...
template <typename S, typename T, typename O>
void row_gradient(const Terms& terms, int64_t vocabulary, const S& s, const T& t, int64_t y, const float* stats, int64_t step, const Parts& parts, const O& out) {
  Slope slope;
  slope.inverse = 1.0f / terms.temperature;
  slope.lse = stats[0];
  slope.lse_q = stats[step];
  slope.lse_p = stats[2 * step];
  slope.reduction = stats[3 * step];
  slope.mixture = terms.mixture;
  slope.kd_scale = parts.kd_scale;
  slope.ce_scale = parts.ce_scale;
  slope.ce_square = parts.ce_scale * static_cast<float>(::exp(2.0 * static_cast<double>(slope.lse_q) - static_cast<double>(slope.lse)));
  slope.shared = terms.smoothing > 0 ? parts.ce_scale * (terms.smoothing / stats[4 * step]) : 0.0f;
  slope.at_target = (1.0f - terms.smoothing) * parts.ce_scale;
  if (!parts.with_kd) return write_gradient<kAtOne, kForwardKl, false, true>(slope, vocabulary, s, t, y, out);
  if (parts.with_ce) return write_both<true>(terms, slope, vocabulary, s, t, y, out);
  write_both<false>(terms, slope, vocabulary, s, t, y, out);
}

}  // namespace
}  // namespace cvmk::distill
