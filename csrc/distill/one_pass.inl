// Loss and gradient of one row by forward KL at the temperatures 1 and 2: the sweep that makes the sums keeps its exponentials in the second-
// level cache, and the gradient is made from them, without another one.
#pragma once

#include "distill/gradients.inl"

namespace cvmk::distill {
namespace {

// exp((s - top_s) / T) and exp((t - top_t) / T) of a row, with the greatest logits that each block's are relative to.
struct Exponentials {
  float* student;
  float* teacher;
  float* tops;  // [blocks, 2]
  int64_t blocks = 0;

  // Floats that a row needs, with what is loaded behind the last of them: a multiple of a cache line's.
  static int64_t size(int64_t vocabulary) { return (2 * padded(vocabulary) + 2 * (vocabulary / kBlock + 2) + kLanes + 15) / 16 * 16; }
  static int64_t padded(int64_t vocabulary) { return (vocabulary + kLanes - 1) / kLanes * kLanes; }
  Exponentials(float* place, int64_t vocabulary) : student(place), teacher(place + padded(vocabulary)), tops(place + 2 * padded(vocabulary)) {}

  CVMK_INLINE void put(int64_t i, F e, F p) const {
    simd::store(student + i, e);
    simd::store(teacher + i, p);
  }
  CVMK_INLINE void end_block(const Sums& sums) {
    tops[2 * blocks] = sums.top_s;
    tops[2 * blocks + 1] = sums.top_t;
    ++blocks;
  }
};

// What a block's exponentials are multiplied by: gradient = e of_e - p of_p + e^2 of_square.
struct Factors {
  float of_e, of_p, of_square;
};

template <int kTemperature>
CVMK_INLINE Factors factors_of(const RowResult& row, const Parts& parts, float top_s, float top_t, double inverse) {
  const double q = ::exp(static_cast<double>(top_s) * inverse - row.lse_q), p = ::exp(static_cast<double>(top_t) * inverse - row.lse_p);
  const double kd = static_cast<double>(parts.kd_scale), ce = parts.with_ce ? static_cast<double>(parts.ce_scale) : 0.0;
  if (kTemperature == kAtOne) return {static_cast<float>((kd + ce) * q), static_cast<float>(kd * p), 0.0f};
  return {static_cast<float>(kd * q), static_cast<float>(kd * p), static_cast<float>(ce * ::exp(static_cast<double>(top_s) - row.lse))};
}

// The entries [begin, end) of the gradient; `head` is out's.
template <int kTemperature, typename S, typename O>
CVMK_INLINE void write_block(const Exponentials& kept, const Factors& factors, float shared, float at_target, const S& s, int64_t y, const O& out, int64_t head,
                             int64_t begin, int64_t end) {
  const F of_e = simd::set(factors.of_e), of_p = simd::set(factors.of_p), of_square = simd::set(factors.of_square), low = simd::set(-__builtin_inff());
  const auto body = [&](int64_t i, int n, auto kind) __attribute__((always_inline)) {
    const F e = simd::load(kept.student + i), p = simd::load(kept.teacher + i);
    F grad = kTemperature == kAtTwo ? e * (e * of_square + of_e) - p * of_p : e * of_e - p * of_p;
    if (shared != 0) grad -= zero_where(s.load(i, n, kind) == low, simd::set(shared));
    if (static_cast<uint64_t>(y - i) < static_cast<uint64_t>(kLanes)) grad -= zero_where(lanes() != simd::seti(static_cast<int>(y - i)), simd::set(at_target));
    out.store(i, n, grad, kind);
  };
  const int64_t part = head < end - begin ? head : end - begin;
  if (part > 0) body(begin, static_cast<int>(part), Part{});
  vectors(begin + part, end, body);
}

// As row_losses and row_gradient after each other, with `place` for Exponentials::size(vocabulary) floats.
template <int kTemperature, typename S, typename T, typename O>
void row_in_one_pass(const Terms& terms, int64_t vocabulary, const S& s, const T& t, int64_t y, float* stats, int64_t step, float* kd, float* ce,
                     const Parts& parts, const O& out, float* place) {
  Exponentials kept(place, vocabulary);
  Sums sums;
  first_pass<kTemperature, kForward>(terms, vocabulary, s, t, sums, kept);
  const RowResult row = result_of(terms, sums, true, entry(s, y));
  write_result(row, stats, step, kd, ce);
  // Factors of blocks far below the row's greatest logit would lose digits; the first block's are the smallest. Not so for NaN.
  const double inverse = 1.0 / static_cast<double>(terms.temperature), most = 60;
  const double top_s = static_cast<double>(kept.tops[0]), top_t = static_cast<double>(kept.tops[1]);
  if (!(row.lse_q - top_s * inverse < most && row.lse_p - top_t * inverse < most && row.lse - top_s < most))
    return row_gradient(terms, vocabulary, s, t, y, stats, step, parts, out);
  const float ce_scale = parts.with_ce ? parts.ce_scale : 0.0f;
  const float shared = terms.smoothing > 0 ? ce_scale * (terms.smoothing / stats[4 * step]) : 0.0f, at_target = (1.0f - terms.smoothing) * ce_scale;
  const int64_t head = out.head(vocabulary);
  Factors factors{};
  int64_t end = 0;
  for (int64_t block = 0; block < kept.blocks; ++block) {
    const int64_t begin = end;
    end = begin + (begin == 0 ? kFirstBlock : kBlock);
    if (end > vocabulary) end = vocabulary;
    const float* const tops = kept.tops + 2 * block;
    if (block == 0 || tops[0] != tops[-2] || tops[1] != tops[-1]) factors = factors_of<kTemperature>(row, parts, tops[0], tops[1], inverse);
    write_block<kTemperature>(kept, factors, shared, at_target, s, y, out, head, begin, end);
  }
}

}  // namespace
}  // namespace cvmk::distill
