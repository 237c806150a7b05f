// linear_kd_loss on a block of logits that lies transposed in the cache: an entry of the vocabulary is a row, and the lanes of a vector are
// rows of the batch. csrc/distill/losses.inl and gradients.inl have the same for a row at a time.
#pragma once

#include "distill/linear_chunk.inl"

namespace cvmk::distill {
namespace {

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
constexpr int64_t kStretch = 16;
template <typename Body>
CVMK_INLINE void stretches(int64_t columns, const Body& body) {
  for (int64_t v = 0; v < columns; v += kStretch) body(v, least(columns, v + kStretch));
}

// What a block adds to the sums of a vector of rows, entry after entry.
template <int kTemperature, int kKind, bool kCareful>
struct Added {
  F max_s, max_t, one{}, at_t{}, teacher{}, cross{};

  CVMK_INLINE void add(F z, F w, float inverse) {
    const F a = z - max_s;
    const F e = exp_below(kTemperature == kAtOne ? a : a * inverse);
    at_t += e;
    if (kTemperature == kAtTwo) one += e * e;
    if (kTemperature == kAtAny) one += exp_below(a);
    if (kKind == kNoTeacher) return;
    const F b = w - max_t;
    const F p = exp_below(kTemperature == kAtOne ? b : b * inverse);
    teacher += p;
    if (kKind == kForward) cross += p * (kCareful ? zero_where(p == F{}, w - z) : w - z);
    if (kKind == kReverse) cross += e * (kCareful ? zero_where(e == F{}, z - w) : z - w);
  }
  CVMK_INLINE void add(const Added& stretch) {
    one += stretch.one;
    at_t += stretch.at_t;
    teacher += stretch.teacher;
    cross += stretch.cross;
  }
  CVMK_INLINE Added empty() const { return {max_s, max_t}; }
};

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

// The greatest logits of a vector of rows among the first entries of a block, and among those before.
template <bool kTeacher, typename E>
CVMK_INLINE void raise(const Block& block, const Columns& logits, const Own<E>& own, int64_t entries, F& max_s, F& max_t) {
  for (int64_t v = 0; v < least(entries, block.columns); ++v) {
    max_s = simd::max(simd::load(logits.s + v * E::stride(logits)) + own.student_bias[v], max_s);
    if (kTeacher) max_t = simd::max(simd::load(logits.t + v * E::stride(logits)) + own.teacher_bias[v], max_t);
  }
}

// What is done with a vector of rows of a block's logits: unit(u) for u in [0, units), then finish().
// The sums. csrc/distill/losses.inl explains the quick and the careful form. What a row's sums are does not depend on its neighbours.
template <int kTemperature, int kKind, typename E>
struct SumsWork {
  static constexpr bool kTeacher = kKind != kNoTeacher;
  const Chunk<E>& chunk;
  const Block& block;
  const Own<E>& own;
  Columns logits;
  int64_t row;
  float inverse;
  Added<kTemperature, kKind, false> total, part;

  CVMK_INLINE SumsWork(const Chunk<E>& c, const Block& b, const Own<E>& o, const Columns& l, int64_t r)
      : chunk(c), block(b), own(o), logits(l), row(r), inverse(1.0f / c.pass.terms.temperature) {
    total.max_s = simd::load(sum(kTopS));
    total.max_t = simd::load(sum(kTopT));
    if (block.opens) raise<kTeacher>(block, logits, own, 2 * kStretch, total.max_s, total.max_t);
    part = total;
  }
  CVMK_INLINE float* sum(int kind) const { return chunk.sum(block.group, kind) + row; }
  CVMK_INLINE F student(int64_t v) const { return simd::load(logits.s + v * E::stride(logits)) + own.student_bias[v]; }
  CVMK_INLINE F teacher(int64_t v) const { return kTeacher ? simd::load(logits.t + v * E::stride(logits)) + own.teacher_bias[v] : F{}; }

  CVMK_INLINE static int64_t units(const Block& block) { return block.columns; }
  CVMK_INLINE void unit(int64_t v) {
    part.add(student(v), teacher(v), inverse);
    if (v % kStretch != kStretch - 1) return;
    total.add(part);
    part = part.empty();
  }

  CVMK_INLINE void finish() {
    total.add(part);
    const I missing = ~store(total, simd::seti(-1));
    if (any(missing)) careful(*this, missing);
    if (chunk.pass.terms.smoothing > 0) add_present(chunk, block, row, logits, own);
  }

  // Of a copy: the sums of the quick form stay in registers where nothing takes their address.
  __attribute__((noinline)) static void careful(SumsWork work, I wanted) {
    Added<kTemperature, kKind, true> all;
    all.max_s = simd::load(work.sum(kTopS)), all.max_t = simd::load(work.sum(kTopT));
    raise<kTeacher>(work.block, work.logits, work.own, work.block.columns, all.max_s, all.max_t);
    stretches(work.block.columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      Added<kTemperature, kKind, true> some = all.empty();
      for (int64_t v = begin; v < end; ++v) some.add(work.student(v), work.teacher(v), work.inverse);
      all.add(some);
    });
    work.store(all, wanted);
  }

  // Adds where they are wanted, and, of the quick form, finite; says where.
  template <bool kCareful>
  CVMK_INLINE I store(const Added<kTemperature, kKind, kCareful>& x, I wanted) {
    const F one = kTemperature == kAtOne ? x.at_t : x.one;
    if (!kCareful) wanted &= one + x.at_t + x.teacher + simd::abs(x.cross) < __builtin_inff();
    const F old_s = simd::load(sum(kTopS)), old_t = simd::load(sum(kTopT)), same = simd::set(1.0f);
    const F fall_s = kCareful ? exp_below((old_s - x.max_s) * inverse) : same, fall_t = kCareful ? exp_below((old_t - x.max_t) * inverse) : same;
    const auto put = [&](int kind, F value) { simd::store(sum(kind), simd::select(wanted, value, simd::load(sum(kind)))); };
    const auto add = [&](int kind, F factor, F more) { put(kind, zero_where(factor == F{}, simd::load(sum(kind)) * factor) + more); };
    add(kAtTSum, fall_s, x.at_t);
    add(kAtOneSum, kCareful ? exp_below(old_s - x.max_s) : same, one);
    put(kTopS, x.max_s);
    if (!kTeacher) return wanted;
    add(kTeacherSum, fall_t, x.teacher);
    if (kKind != kOther) add(kCross, kKind == kForward ? fall_t : fall_s, x.cross);
    put(kTopT, x.max_t);
    return wanted;
  }
};

// Adds a block to the sums of a mixture's divergence, kept in kAtOneSum and kAtTSum.
template <int kDivergence, typename E>
struct MixtureWork {
  const Chunk<E>& chunk;
  const Block& block;
  const Own<E>& own;
  Columns logits;
  int64_t row;
  float inverse;
  F lse_q, lse_p, first{}, second{}, of_first{}, of_second{};

  CVMK_INLINE MixtureWork(const Chunk<E>& c, const Block& b, const Own<E>& o, const Columns& l, int64_t r)
      : chunk(c), block(b), own(o), logits(l), row(r), inverse(1.0f / c.pass.terms.temperature) {
    lse_q = simd::load(chunk.value(kLseQ) + row);
    lse_p = simd::load(chunk.value(kLseP) + row);
  }
  CVMK_INLINE static int64_t units(const Block& block) { return block.columns; }
  CVMK_INLINE void unit(int64_t v) {
    const F log_q = (simd::load(logits.s + v * E::stride(logits)) + own.student_bias[v]) * inverse - lse_q;
    const F log_p = (simd::load(logits.t + v * E::stride(logits)) + own.teacher_bias[v]) * inverse - lse_p;
    F x, y;
    mixture_terms<kDivergence>(log_q, log_p, chunk.pass.terms.mixture, x, y);
    of_first += x;
    of_second += y;
    if (v % kStretch == kStretch - 1) flush();
  }
  CVMK_INLINE void flush() {
    first += of_first;
    second += of_second;
    of_first = of_second = F{};
  }
  CVMK_INLINE void finish() {
    flush();
    float *one = chunk.sum(block.group, kAtOneSum) + row, *two = chunk.sum(block.group, kAtTSum) + row;
    simd::store(one, simd::load(one) + first);
    simd::store(two, simd::load(two) + second);
  }
};

// The gradient of a block and a vector of rows, to where the engine's products take it from.
template <int kTemperature, int kDivergence, bool kKd, bool kCe, typename E>
struct GradientWork {
  const Block& block;
  const Own<E>& own;
  Columns logits;
  int64_t row;
  float* d_bias;
  float inverse, mixture;
  bool smooth;
  F kd_scale, reduction, lse_q, lse_p, lse, ce_scale, ce_square, shared, at_target;
  I target;

  CVMK_INLINE GradientWork(const Chunk<E>& chunk, const Block& b, const Own<E>& o, const Columns& l, int64_t r) : block(b), own(o), logits(l), row(r) {
    const LinearPass& pass = chunk.pass;
    const auto value = [&](int kind) { return simd::load(chunk.value(kind) + row); };
    d_bias = pass.d_bias == nullptr ? nullptr : pass.d_bias + block.first;
    inverse = 1.0f / pass.terms.temperature;
    mixture = pass.terms.mixture;
    smooth = pass.terms.smoothing > 0;
    kd_scale = value(kKdScale), reduction = value(kReduction), lse_q = value(kLseQ), lse_p = value(kLseP), lse = value(kLse);
    ce_scale = value(kCeScale), ce_square = value(kSquare), shared = value(kShared);
    at_target = ce_scale * (1.0f - pass.terms.smoothing);
    memcpy(&target, chunk.target + row, sizeof target);
  }

  CVMK_INLINE F entry(int64_t v) const {
    const F z = simd::load(logits.s + v * E::stride(logits)) + own.student_bias[v];
    F grad{};
    if (kKd) {
      const F log_q = z * inverse - lse_q, log_p = (simd::load(logits.t + v * E::stride(logits)) + own.teacher_bias[v]) * inverse - lse_p;
      const F q = exp_below(log_q), p = exp_below(log_p);
      grad = divergence_gradient<kDivergence>(*this, log_q, log_p, q, p);
      if (kCe && kTemperature == kAtOne) grad += q * ce_scale;
      if (kCe && kTemperature == kAtTwo) grad += q * q * ce_square;
    }
    if (kCe) {
      if (!kKd || kTemperature == kAtAny) grad += exp_below(z - lse) * ce_scale;
      if (smooth) grad -= zero_where(z == simd::set(-__builtin_inff()), shared);
      grad -= zero_where(target != simd::seti(static_cast<int>(block.first + v)), at_target);
    }
    if (d_bias != nullptr) d_bias[v] += simd::sum(grad);
    return grad;
  }

  CVMK_INLINE static int64_t units(const Block& block) { return E::gradient_units(block); }
  CVMK_INLINE void unit(int64_t u) { E::put_gradient(*this, u); }
  CVMK_INLINE void finish() {}
};

}  // namespace
}  // namespace cvmk::distill
