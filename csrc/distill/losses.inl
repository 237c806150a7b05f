// Statistics and losses of one row of logits. Sums over a row are sums of its blocks' float32 sums in float64, in an order that depends on
// nothing but the vocabulary. A row is read from memory once; the divergences of a mixture read it again from the second-level cache.
#pragma once

#include "distill/vectors.inl"

namespace cvmk::distill {
namespace {

enum Temperature { kAtOne, kAtTwo, kAtAny };
enum Kind { kNoTeacher, kForward, kReverse, kOther };

// Sums relative to the greatest logits so far. at_one: sum exp(s - top_s); at_t: sum exp((s - top_s) / T); teacher: sum exp((t - top_t) / T);
// cross: for kForward sum exp((t - top_t) / T) (t - s), for kReverse sum exp((s - top_s) / T) (s - t), with 0 * inf = 0;
// logits and count, for label smoothing: the sum and the number of the student's logits that are not -inf.
struct Sums {
  float top_s = -FLT_MAX, top_t = -FLT_MAX;
  double at_one = 0, at_t = 0, teacher = 0, cross = 0, logits = 0, count = 0;
};

CVMK_INLINE void rescale(double& sum, double factor) { sum = factor == 0 ? 0 : sum * factor; }

template <int kKind, typename S, typename T>
CVMK_INLINE void raise(Sums& sums, const S& s, const T& t, int64_t begin, int64_t end, float inverse) {
  const float top_s = greatest(s, begin, end);
  if (top_s > sums.top_s) {
    const double fall = static_cast<double>(sums.top_s) - static_cast<double>(top_s);
    const double factor = ::exp(fall * static_cast<double>(inverse));
    rescale(sums.at_one, ::exp(fall));
    rescale(sums.at_t, factor);
    if (kKind == kReverse) rescale(sums.cross, factor);
    sums.top_s = top_s;
  }
  if (kKind == kNoTeacher) return;
  const float top_t = greatest(t, begin, end);
  if (top_t > sums.top_t) {
    const double factor = ::exp((static_cast<double>(sums.top_t) - static_cast<double>(top_t)) * static_cast<double>(inverse));
    rescale(sums.teacher, factor);
    if (kKind == kForward) rescale(sums.cross, factor);
    sums.top_t = top_t;
  }
}

// What a sweep keeps of its exponentials: nothing. See one_pass.inl.
struct KeepNothing {
  CVMK_INLINE void put(int64_t, F, F) const {}
  CVMK_INLINE void end_block(const Sums&) {}
};

// Adds the logits [begin, end) to the sums and says whether it did. The quick form takes the greatest logits of the blocks before for those
// of this one, and entries of -inf for absent: it adds nothing where a sum is then not finite, and the careful form has to.
template <int kTemperature, int kKind, bool kCareful, typename S, typename T, typename Keep>
CVMK_INLINE bool add_block(Sums& sums, const S& s, const T& t, int64_t begin, int64_t end, float inverse, const Keep& keep) {
  if (kCareful) raise<kKind>(sums, s, t, begin, end, inverse);
  const F max_s = simd::set(sums.top_s), max_t = simd::set(sums.top_t), scale = simd::set(inverse);
  F one{}, at_t{}, teacher{}, cross{};
  vectors(begin, end, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) {
    s.prefetch(i + kBlock);
    const F z = s.load(i, n, kind);
    const F a = z - max_s;
    const F e = within(exp_below(kTemperature == kAtOne ? a : a * scale), n, kind);
    at_t += e;
    if (kTemperature == kAtTwo) one += e * e;
    if (kTemperature == kAtAny) one += within(exp_below(a), n, kind);
    if (kKind == kNoTeacher) return;
    t.prefetch(i + kBlock);
    const F w = t.load(i, n, kind);
    const F b = w - max_t;
    const F p = within(exp_below(kTemperature == kAtOne ? b : b * scale), n, kind);
    teacher += p;
    keep.put(i, e, p);
    if (kKind == kForward) cross += p * (kCareful ? zero_where(p == F{}, w - z) : w - z);
    if (kKind == kReverse) cross += e * (kCareful ? zero_where(e == F{}, z - w) : z - w);
  });
  const float of_one = simd::sum(kTemperature == kAtOne ? at_t : one), of_t = simd::sum(at_t), of_teacher = simd::sum(teacher), of_cross = simd::sum(cross);
  if (!kCareful && !(of_one + of_t + of_teacher + (of_cross < 0 ? -of_cross : of_cross) < __builtin_inff())) return false;
  sums.at_t += static_cast<double>(of_t);
  sums.at_one += static_cast<double>(of_one);
  sums.teacher += static_cast<double>(of_teacher);
  sums.cross += static_cast<double>(of_cross);
  return true;
}

template <typename S>
CVMK_INLINE void add_logits(Sums& sums, const S& s, int64_t begin, int64_t end) {
  F total{}, count{};
  const F low = simd::set(-__builtin_inff());
  vectors(begin, end, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) {
    const F z = s.load(i, n, kind);
    const I absent = z == low;
    total += zero_where(absent, z);
    count += within(zero_where(absent, simd::set(1.0f)), n, kind);
  });
  sums.logits += static_cast<double>(simd::sum(total));
  sums.count += static_cast<double>(simd::sum(count));
}

template <int kTemperature, int kKind, typename S, typename T, typename Keep>
__attribute__((noinline)) void first_pass(const Terms& terms, int64_t vocabulary, const S& s, const T& t, Sums& sums, Keep& keep) {
  const float inverse = 1.0f / terms.temperature;
  int64_t end = 0;
  for (int64_t begin = 0; begin < vocabulary; begin = end) {
    end = begin + (begin == 0 ? kFirstBlock : kBlock);
    if (end > vocabulary) end = vocabulary;
    if (begin == 0 || !add_block<kTemperature, kKind, false>(sums, s, t, begin, end, inverse, keep))
      add_block<kTemperature, kKind, true>(sums, s, t, begin, end, inverse, keep);
    keep.end_block(sums);
    if (terms.smoothing > 0) add_logits(sums, s, begin, end);
  }
}

// Adds to the two sums that the divergence D of a mixture and its reduction R are made of.
template <int kDivergence>
CVMK_INLINE void mixture_terms(F log_q, F log_p, float weight, F& x, F& y) {
  const F q = exp_below(log_q), p = exp_below(log_p);
  const F mixed = kDivergence == kSkewReverseKl ? mix(q, p, weight) : mix(p, q, weight);
  const F log_m = simd::log(mixed);
  if (kDivergence == kSkewReverseKl) x = q * zero_where(q == F{}, log_q - log_m);
  else x = p * zero_where(p == F{}, log_p - log_m);
  if (kDivergence == kJs) y = q * zero_where(q == F{}, log_q - log_m);
  if (kDivergence == kSkewKl) y = q * (p / mixed);
  if (kDivergence == kSkewReverseKl) y = q * (q / mixed);
}

CVMK_INLINE void mixture_value(const Terms& terms, double first, double second, double& value, double& reduction) {
  const double w = static_cast<double>(terms.mixture);
  reduction = terms.divergence == kJs ? (1 - w) * second : terms.divergence == kSkewKl ? (w - 1) * second : first + 1 - w * second;
  value = terms.divergence == kJs ? w * first + reduction : first;
}

// The divergence of a mixture of one row and its reduction, from the log-sum-exps.
template <int kDivergence, typename S, typename T>
__attribute__((noinline)) void second_pass(const Terms& terms, int64_t vocabulary, const S& s, const T& t, float lse_q, float lse_p, double& value,
                                           double& reduction) {
  const float inverse = 1.0f / terms.temperature;
  double first = 0, second = 0;
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t end = begin + kBlock < vocabulary ? begin + kBlock : vocabulary;
    F a{}, b{};
    vectors(begin, end, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) {
      F x, y;
      mixture_terms<kDivergence>(s.load(i, n, kind) * inverse - lse_q, t.load(i, n, kind) * inverse - lse_p, terms.mixture, x, y);
      a += within(x, n, kind);
      b += within(y, n, kind);
    });
    first += static_cast<double>(simd::sum(a));
    second += static_cast<double>(simd::sum(b));
  }
  mixture_value(terms, first, second, value, reduction);
}

template <typename S, typename T>
CVMK_INLINE void sum_row(const Terms& terms, int64_t vocabulary, const S& s, const T& t, bool with_teacher, Sums& sums) {
  KeepNothing keep;
  if (!with_teacher) return first_pass<kAtOne, kNoTeacher>(terms, vocabulary, s, t, sums, keep);
  if (terms.divergence == kReverseKl) return first_pass<kAtAny, kReverse>(terms, vocabulary, s, t, sums, keep);
  if (terms.divergence != kForwardKl) return first_pass<kAtAny, kOther>(terms, vocabulary, s, t, sums, keep);
  if (terms.temperature == 1.0f) return first_pass<kAtOne, kForward>(terms, vocabulary, s, t, sums, keep);
  if (terms.temperature == 2.0f) return first_pass<kAtTwo, kForward>(terms, vocabulary, s, t, sums, keep);
  first_pass<kAtAny, kForward>(terms, vocabulary, s, t, sums, keep);
}

// Losses and statistics of one row. `value` and `reduction` of the divergences of a mixture are another sweep's.
struct RowResult {
  double lse, lse_q, lse_p, value, reduction, entropy, count;
};

CVMK_INLINE RowResult result_of(const Terms& terms, const Sums& sums, bool with_teacher, float at_target) {
  const double temperature = static_cast<double>(terms.temperature), smoothing = static_cast<double>(terms.smoothing);
  RowResult row{};
  row.lse = row.lse_q = static_cast<double>(sums.top_s) + ::log(sums.at_one);
  if (with_teacher) {
    row.lse_q = static_cast<double>(sums.top_s) / temperature + ::log(sums.at_t);
    row.lse_p = static_cast<double>(sums.top_t) / temperature + ::log(sums.teacher);
    if (terms.divergence == kForwardKl) row.value = sums.cross / (sums.teacher * temperature) - row.lse_p + row.lse_q;
    if (terms.divergence == kReverseKl) {
      const double mean = sums.cross / (sums.at_t * temperature);
      row.value = mean - row.lse_q + row.lse_p;
      // The gradient subtracts it from differences that hold the rounded statistics: what they lack must cancel.
      row.reduction = mean - static_cast<double>(static_cast<float>(row.lse_q)) + static_cast<double>(static_cast<float>(row.lse_p));
    }
  }
  row.entropy = row.lse - (1 - smoothing) * static_cast<double>(at_target);
  if (smoothing > 0) row.entropy -= smoothing / sums.count * sums.logits;
  row.count = sums.count;
  return row;
}

// Statistics go to stats[0], stats[step], ... stats[4 * step].
CVMK_INLINE void write_result(const RowResult& row, float* stats, int64_t step, float* kd, float* ce) {
  *kd = static_cast<float>(row.value);
  *ce = static_cast<float>(row.entropy);
  stats[0] = static_cast<float>(row.lse);
  stats[step] = static_cast<float>(row.lse_q);
  stats[2 * step] = static_cast<float>(row.lse_p);
  stats[3 * step] = static_cast<float>(row.reduction);
  stats[4 * step] = static_cast<float>(row.count);
}

// The losses of a row with target y, and its statistics.
template <typename S, typename T>
void row_losses(const Terms& terms, int64_t vocabulary, const S& s, const T& t, bool with_teacher, int64_t y, float* stats, int64_t step, float* kd, float* ce) {
  Sums sums;
  sum_row(terms, vocabulary, s, t, with_teacher, sums);
  RowResult row = result_of(terms, sums, with_teacher, entry(s, y));
  if (with_teacher) {
    const float q = static_cast<float>(row.lse_q), p = static_cast<float>(row.lse_p);
    if (terms.divergence == kJs) second_pass<kJs>(terms, vocabulary, s, t, q, p, row.value, row.reduction);
    if (terms.divergence == kSkewKl) second_pass<kSkewKl>(terms, vocabulary, s, t, q, p, row.value, row.reduction);
    if (terms.divergence == kSkewReverseKl) second_pass<kSkewReverseKl>(terms, vocabulary, s, t, q, p, row.value, row.reduction);
  }
  write_result(row, stats, step, kd, ce);
}

}  // namespace
}  // namespace cvmk::distill
