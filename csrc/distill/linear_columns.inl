// linear_kd_loss on a block of logits that lies transposed in the cache: an entry of the vocabulary is a row, and the lanes of a vector are
// rows of the batch. csrc/distill/losses.inl and gradients.inl have the same for a row at a time.
#pragma once

#include "distill/linear_chunk.inl"

namespace {
namespace distill {

// Adds a block to the sums of 16 rows and says whether it did: csrc/distill/losses.inl explains the quick and the careful form.
template <int kTemperature, int kKind, bool kCareful>
CVMK_INLINE bool add_columns(const Chunk& chunk, const Block& block, int64_t row, const Own& own, int64_t lane, float inverse) {
  const auto sum = [&](int kind) { return chunk.sum(block.group, kind) + row; };
  const float *s = own.s + lane, *t = own.t + lane, *bias = own.student_bias, *t_bias = own.teacher_bias;
  const F old_s = simd::load(sum(kTopS)), old_t = simd::load(sum(kTopT));
  F max_s = old_s, max_t = old_t;
  for (int64_t v = 0; kCareful && v < block.columns; ++v) {
    max_s = simd::max(simd::load(s + v * kRowBlock) + bias[v], max_s);
    if (kKind != kNoTeacher) max_t = simd::max(simd::load(t + v * kRowBlock) + t_bias[v], max_t);
  }
  F one{}, at_t{}, teacher{}, cross{};
  for (int64_t v = 0; v < block.columns; ++v) {
    const F z = simd::load(s + v * kRowBlock) + bias[v];
    const F a = z - max_s;
    const F e = exp_below(kTemperature == kAtOne ? a : a * inverse);
    at_t += e;
    if (kTemperature == kAtTwo) one += e * e;
    if (kTemperature == kAtAny) one += exp_below(a);
    if (kKind == kNoTeacher) continue;
    const F w = simd::load(t + v * kRowBlock) + t_bias[v];
    const F b = w - max_t;
    const F p = exp_below(kTemperature == kAtOne ? b : b * inverse);
    teacher += p;
    if (kKind == kForward) cross += p * (kCareful ? zero_where(p == F{}, w - z) : w - z);
    if (kKind == kReverse) cross += e * (kCareful ? zero_where(e == F{}, z - w) : z - w);
  }
  if (kTemperature == kAtOne) one = at_t;
  if (!kCareful && !all_finite(one + at_t + teacher + simd::abs(cross))) return false;
  const F fall_s = kCareful ? exp_below((old_s - max_s) * inverse) : simd::set(1.0f), fall_t = kCareful ? exp_below((old_t - max_t) * inverse) : fall_s;
  const auto add = [&](int kind, F factor, F more) { simd::store(sum(kind), zero_where(factor == F{}, simd::load(sum(kind)) * factor) + more); };
  add(kAtTSum, fall_s, at_t);
  add(kAtOneSum, kCareful ? exp_below(old_s - max_s) : fall_s, one);
  simd::store(sum(kTopS), max_s);
  if (kKind == kNoTeacher) return true;
  add(kTeacherSum, fall_t, teacher);
  if (kKind != kOther) add(kCross, kKind == kForward ? fall_t : fall_s, cross);
  simd::store(sum(kTopT), max_t);
  return true;
}

// For label smoothing: the sum and number of the logits that are not -inf.
CVMK_INLINE void add_present(const Chunk& chunk, const Block& block, int64_t row, const Own& own, int64_t lane) {
  const float* bias = own.student_bias;
  F total = simd::load(chunk.sum(block.group, kLogits) + row), count = simd::load(chunk.sum(block.group, kPresent) + row), part{};
  const F low = simd::set(-__builtin_inff());
  for (int64_t v = 0; v < block.columns; ++v) {
    const F z = simd::load(own.s + lane + v * kRowBlock) + bias[v];
    const I absent = z == low;
    part += zero_where(absent, z);
    count += zero_where(absent, simd::set(1.0f));
  }
  simd::store(chunk.sum(block.group, kLogits) + row, total + part);
  simd::store(chunk.sum(block.group, kPresent) + row, count);
}

// Adds a block to the sums of a mixture's divergence, kept in kAtOneSum and kAtTSum.
template <int kDivergence>
CVMK_INLINE void add_mixture(const Chunk& chunk, const Block& block, int64_t row, const Own& own, int64_t lane, float inverse) {
  const float *bias = own.student_bias, *t_bias = own.teacher_bias;
  const float weight = chunk.pass.terms.mixture;
  const F lse_q = simd::load(chunk.value(kLseQ) + row), lse_p = simd::load(chunk.value(kLseP) + row);
  F a{}, b{};
  for (int64_t v = 0; v < block.columns; ++v) {
    const F log_q = (simd::load(own.s + lane + v * kRowBlock) + bias[v]) * inverse - lse_q;
    const F log_p = (simd::load(own.t + lane + v * kRowBlock) + t_bias[v]) * inverse - lse_p;
    F x, y;
    mixture_terms<kDivergence>(log_q, log_p, weight, x, y);
    a += x;
    b += y;
  }
  float *first = chunk.sum(block.group, kAtOneSum) + row, *second = chunk.sum(block.group, kAtTSum) + row;
  simd::store(first, simd::load(first) + a);
  simd::store(second, simd::load(second) + b);
}

// The gradient of a block and 16 rows: G in tiles [row / 16][column / 32] and turned, in tiles [column / 16][row / 32].
template <int kTemperature, int kDivergence, bool kKd, bool kCe>
CVMK_INLINE void block_gradient(const Chunk& chunk, const Block& block, int64_t row, const Own& own, int64_t lane, float* d_bias) {
  const float *bias = own.student_bias, *t_bias = own.teacher_bias;
  const int64_t columns = block.columns;
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
    const F z = simd::load(own.s + lane + v * kRowBlock) + bias[v];
    F grad{};
    if (kKd) {
      const F log_q = z * inverse - lse_q, log_p = (simd::load(own.t + lane + v * kRowBlock) + t_bias[v]) * inverse - lse_p;
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
  Half* tile = own.g_tiles + row % kSub / 16 * (kColumns / 32) * kTile;
  Half* turned = own.g_turned + row % kSub / 32 * kTile + row % 32;
  for (int64_t v = 0; v < columns; v += 32, tile += kTile) {
    __m512i words[16];
    for (int k = 0; k < 16; ++k) {
      const int64_t c = v + 2 * k;
      const F even = c < columns ? gradient(c) : F{}, odd = c + 1 < columns ? gradient(c + 1) : F{};
      if (d_bias != nullptr) {
        if (c < columns) d_bias[c] += simd::sum(even);
        if (c + 1 < columns) d_bias[c + 1] += simd::sum(odd);
      }
      Half* to = turned + c / 16 * (kSub / 32) * kTile + c % 16 * 32;
      const __m256i e = simd::bits<__m256i>(_mm512_cvtneps_pbh(simd::bits<__m512>(even))), o = simd::bits<__m256i>(_mm512_cvtneps_pbh(simd::bits<__m512>(odd)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), e);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), o);
      words[k] = _mm512_or_si512(_mm512_cvtepu16_epi32(e), _mm512_slli_epi32(_mm512_cvtepu16_epi32(o), 16));
    }
    turn(words);
    for (int k = 0; k < 16; ++k) _mm512_storeu_si512(tile + k * 32, words[k]);
  }
}

}  // namespace distill
}  // namespace
