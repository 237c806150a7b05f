// linear_kd_loss on a block of logits that lies transposed in the cache: an entry of the vocabulary is a row, and the lanes of a vector are
// rows of the batch. csrc/distill/losses.inl and gradients.inl have the same for a row at a time.
#pragma once

#include "distill/linear_chunk.inl"

namespace {
namespace distill {

CVMK_INLINE bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(simd::bits<__m512i>(mask), simd::bits<__m512i>(mask)) != 0;
#else
  int found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

// body(begin, end) for stretches of the entries: sums of those are added up, since one float32 sum over all of them would lose digits.
template <typename Body>
CVMK_INLINE void stretches(int64_t columns, const Body& body) {
  for (int64_t v = 0; v < columns; v += 16) body(v, least(columns, v + 16));
}

// Adds a block to the sums of the rows `wanted` and says of which rows it did not: csrc/distill/losses.inl explains the quick and the careful
// form. What a row's sums are does not depend on its neighbours.
template <int kTemperature, int kKind, bool kCareful, typename E>
CVMK_INLINE I add_columns(const Chunk<E>& chunk, const Block& block, int64_t row, const Columns& logits, const Own<E>& own, float inverse, I wanted) {
  const auto sum = [&](int kind) { return chunk.sum(block.group, kind) + row; };
  const float *s = logits.s, *t = logits.t, *bias = own.student_bias, *t_bias = own.teacher_bias;
  const int64_t stride = E::stride(logits);
  const F old_s = simd::load(sum(kTopS)), old_t = simd::load(sum(kTopT));
  F max_s = old_s, max_t = old_t;
  for (int64_t v = 0; kCareful && v < block.columns; ++v) {
    max_s = simd::max(simd::load(s + v * stride) + bias[v], max_s);
    if (kKind != kNoTeacher) max_t = simd::max(simd::load(t + v * stride) + t_bias[v], max_t);
  }
  F one{}, at_t{}, teacher{}, cross{};
  stretches(block.columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    F of_one{}, of_t{}, of_teacher{}, of_cross{};
    for (int64_t v = begin; v < end; ++v) {
      const F z = simd::load(s + v * stride) + bias[v];
      const F a = z - max_s;
      const F e = exp_below(kTemperature == kAtOne ? a : a * inverse);
      of_t += e;
      if (kTemperature == kAtTwo) of_one += e * e;
      if (kTemperature == kAtAny) of_one += exp_below(a);
      if (kKind == kNoTeacher) continue;
      const F w = simd::load(t + v * stride) + t_bias[v];
      const F b = w - max_t;
      const F p = exp_below(kTemperature == kAtOne ? b : b * inverse);
      of_teacher += p;
      if (kKind == kForward) of_cross += p * (kCareful ? zero_where(p == F{}, w - z) : w - z);
      if (kKind == kReverse) of_cross += e * (kCareful ? zero_where(e == F{}, z - w) : z - w);
    }
    one += of_one;
    at_t += of_t;
    teacher += of_teacher;
    cross += of_cross;
  });
  if (kTemperature == kAtOne) one = at_t;
  if (!kCareful) wanted &= one + at_t + teacher + simd::abs(cross) < __builtin_inff();
  const F fall_s = kCareful ? exp_below((old_s - max_s) * inverse) : simd::set(1.0f), fall_t = kCareful ? exp_below((old_t - max_t) * inverse) : fall_s;
  const auto put = [&](int kind, F x) { simd::store(sum(kind), simd::select(wanted, x, simd::load(sum(kind)))); };
  const auto add = [&](int kind, F factor, F more) { put(kind, zero_where(factor == F{}, simd::load(sum(kind)) * factor) + more); };
  add(kAtTSum, fall_s, at_t);
  add(kAtOneSum, kCareful ? exp_below(old_s - max_s) : fall_s, one);
  if (kCareful) put(kTopS, max_s);
  if (kKind == kNoTeacher) return ~wanted;
  add(kTeacherSum, fall_t, teacher);
  if (kKind != kOther) add(kCross, kKind == kForward ? fall_t : fall_s, cross);
  if (kCareful) put(kTopT, max_t);
  return ~wanted;
}

// For label smoothing: the sum and number of the logits that are not -inf.
template <typename E>
CVMK_INLINE void add_present(const Chunk<E>& chunk, const Block& block, int64_t row, const Columns& logits, const Own<E>& own) {
  const float* bias = own.student_bias;
  F total = simd::load(chunk.sum(block.group, kLogits) + row), count = simd::load(chunk.sum(block.group, kPresent) + row);
  const F low = simd::set(-__builtin_inff());
  stretches(block.columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    F part{};
    for (int64_t v = begin; v < end; ++v) {
      const F z = simd::load(logits.s + v * E::stride(logits)) + bias[v];
      const I absent = z == low;
      part += zero_where(absent, z);
      count += zero_where(absent, simd::set(1.0f));
    }
    total += part;
  });
  simd::store(chunk.sum(block.group, kLogits) + row, total);
  simd::store(chunk.sum(block.group, kPresent) + row, count);
}

// Adds a block to the sums of a mixture's divergence, kept in kAtOneSum and kAtTSum.
template <int kDivergence, typename E>
CVMK_INLINE void add_mixture(const Chunk<E>& chunk, const Block& block, int64_t row, const Columns& logits, const Own<E>& own, float inverse) {
  const float *bias = own.student_bias, *t_bias = own.teacher_bias;
  const float weight = chunk.pass.terms.mixture;
  const F lse_q = simd::load(chunk.value(kLseQ) + row), lse_p = simd::load(chunk.value(kLseP) + row);
  F a{}, b{};
  stretches(block.columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    F of_a{}, of_b{};
    for (int64_t v = begin; v < end; ++v) {
      const F log_q = (simd::load(logits.s + v * E::stride(logits)) + bias[v]) * inverse - lse_q;
      const F log_p = (simd::load(logits.t + v * E::stride(logits)) + t_bias[v]) * inverse - lse_p;
      F x, y;
      mixture_terms<kDivergence>(log_q, log_p, weight, x, y);
      of_a += x;
      of_b += y;
    }
    a += of_a;
    b += of_b;
  });
  float *first = chunk.sum(block.group, kAtOneSum) + row, *second = chunk.sum(block.group, kAtTSum) + row;
  simd::store(first, simd::load(first) + a);
  simd::store(second, simd::load(second) + b);
}

// The gradient of a block and a vector of rows, to where the engine's products take it from.
template <int kTemperature, int kDivergence, bool kKd, bool kCe, typename E>
CVMK_INLINE void block_gradient(const Chunk<E>& chunk, const Block& block, int64_t row, const Columns& logits, const Own<E>& own, float* d_bias) {
  const float *bias = own.student_bias, *t_bias = own.teacher_bias;
  const auto value = [&](int kind) { return simd::load(chunk.value(kind) + row); };
  struct {
    F kd_scale, reduction;
    float mixture;
  } const w{value(kKdScale), value(kReduction), chunk.pass.terms.mixture};
  const float inverse = 1.0f / chunk.pass.terms.temperature;
  const F lse_q = value(kLseQ), lse_p = value(kLseP), lse = value(kLse), ce_scale = value(kCeScale), ce_square = value(kSquare), shared = value(kShared);
  const F at_target = ce_scale * (1.0f - chunk.pass.terms.smoothing);
  const bool smooth = chunk.pass.terms.smoothing > 0;
  const F low = simd::set(-__builtin_inff());
  I target;
  memcpy(&target, chunk.target + row, sizeof target);
  const auto gradient = [&](int64_t v) __attribute__((always_inline)) {
    const F z = simd::load(logits.s + v * E::stride(logits)) + bias[v];
    F grad{};
    if (kKd) {
      const F log_q = z * inverse - lse_q, log_p = (simd::load(logits.t + v * E::stride(logits)) + t_bias[v]) * inverse - lse_p;
      const F q = exp_below(log_q), p = exp_below(log_p);
      grad = divergence_gradient<kDivergence>(w, log_q, log_p, q, p);
      if (kCe && kTemperature == kAtOne) grad += q * ce_scale;
      if (kCe && kTemperature == kAtTwo) grad += q * q * ce_square;
    }
    if (kCe) {
      if (!kKd || kTemperature == kAtAny) grad += exp_below(z - lse) * ce_scale;
      if (smooth) grad -= zero_where(z == low, shared);
      grad -= zero_where(target != simd::seti(static_cast<int>(block.first + v)), at_target);
    }
    return grad;
  };
  E::put_gradient(block, row, logits, own, d_bias, gradient);
}

}  // namespace distill
}  // namespace
