// Statistics and losses of one row of logits. Sums over a row are sums of its blocks' float32 sums in float64, in an order that depends on
// nothing but the vocabulary. A row is read from memory once; the divergences of a mixture read it again from the second-level cache.

#include "distill/vectors.inl"

namespace {
namespace distill {

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

template <int kTemperature, int kKind, typename S, typename T>
CVMK_INLINE void add_block(Sums& sums, const S& s, const T& t, int64_t begin, int64_t end, float inverse) {
  raise<kKind>(sums, s, t, begin, end, inverse);
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
    if (kKind == kForward) cross += p * zero_where(p == F{}, w - z);
    if (kKind == kReverse) cross += e * zero_where(e == F{}, z - w);
  });
  sums.at_t += static_cast<double>(simd::sum(at_t));
  sums.at_one += static_cast<double>(simd::sum(kTemperature == kAtOne ? at_t : one));
  if (kKind == kNoTeacher) return;
  sums.teacher += static_cast<double>(simd::sum(teacher));
  if (kKind != kOther) sums.cross += static_cast<double>(simd::sum(cross));
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

template <int kTemperature, int kKind, typename S, typename T>
__attribute__((noinline)) void first_pass(const Terms& terms, int64_t vocabulary, const S& s, const T& t, Sums& sums) {
  const float inverse = 1.0f / terms.temperature;
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t end = begin + kBlock < vocabulary ? begin + kBlock : vocabulary;
    add_block<kTemperature, kKind>(sums, s, t, begin, end, inverse);
    if (terms.smoothing > 0) add_logits(sums, s, begin, end);
  }
}

// The divergence D of a mixture and the reduction R of one row, from the log-sum-exps.
template <int kDivergence, typename S, typename T>
__attribute__((noinline)) void second_pass(const Terms& terms, int64_t vocabulary, const S& s, const T& t, float lse_q, float lse_p, double& value,
                                           double& reduction) {
  const float inverse = 1.0f / terms.temperature, weight = terms.mixture;
  double first = 0, second = 0;
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t end = begin + kBlock < vocabulary ? begin + kBlock : vocabulary;
    F a{}, b{};
    vectors(begin, end, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) {
      const F log_q = s.load(i, n, kind) * inverse - lse_q, log_p = t.load(i, n, kind) * inverse - lse_p;
      const F q = exp_below(log_q), p = exp_below(log_p);
      const F mixed = kDivergence == kSkewReverseKl ? mix(q, p, weight) : mix(p, q, weight);
      const F log_m = simd::log(mixed);
      F x, y;
      if (kDivergence == kJs) {
        x = p * zero_where(p == F{}, log_p - log_m);
        y = q * zero_where(q == F{}, log_q - log_m);
      } else if (kDivergence == kSkewKl) {
        x = p * zero_where(p == F{}, log_p - log_m);
        y = q * (p / mixed);
      } else {
        x = q * zero_where(q == F{}, log_q - log_m);
        y = q * (q / mixed);
      }
      a += within(x, n, kind);
      b += within(y, n, kind);
    });
    first += static_cast<double>(simd::sum(a));
    second += static_cast<double>(simd::sum(b));
  }
  const double w = static_cast<double>(weight);
  reduction = kDivergence == kJs ? (1 - w) * second : kDivergence == kSkewKl ? (w - 1) * second : first + 1 - w * second;
  value = kDivergence == kJs ? w * first + reduction : first;
}

template <typename S, typename T>
CVMK_INLINE void sum_row(const Terms& terms, int64_t vocabulary, const S& s, const T& t, bool with_teacher, Sums& sums) {
  if (!with_teacher) return first_pass<kAtOne, kNoTeacher>(terms, vocabulary, s, t, sums);
  if (terms.divergence == kReverseKl) return first_pass<kAtAny, kReverse>(terms, vocabulary, s, t, sums);
  if (terms.divergence != kForwardKl) return first_pass<kAtAny, kOther>(terms, vocabulary, s, t, sums);
  if (terms.temperature == 1.0f) return first_pass<kAtOne, kForward>(terms, vocabulary, s, t, sums);
  if (terms.temperature == 2.0f) return first_pass<kAtTwo, kForward>(terms, vocabulary, s, t, sums);
  first_pass<kAtAny, kForward>(terms, vocabulary, s, t, sums);
}

// The losses of a row with target y, and its statistics at stats[0], stats[step], ... stats[4 * step].
template <typename S, typename T>
void row_losses(const Terms& terms, int64_t vocabulary, const S& s, const T& t, bool with_teacher, int64_t y, float* stats, int64_t step, float* kd, float* ce) {
  Sums sums;
  sum_row(terms, vocabulary, s, t, with_teacher, sums);
  const double temperature = static_cast<double>(terms.temperature), smoothing = static_cast<double>(terms.smoothing);
  const double lse = static_cast<double>(sums.top_s) + ::log(sums.at_one);
  double lse_q = lse, lse_p = 0, value = 0, reduction = 0;
  if (with_teacher) {
    lse_q = static_cast<double>(sums.top_s) / temperature + ::log(sums.at_t);
    lse_p = static_cast<double>(sums.top_t) / temperature + ::log(sums.teacher);
    const float q = static_cast<float>(lse_q), p = static_cast<float>(lse_p);
    switch (terms.divergence) {
      case kForwardKl: value = sums.cross / (sums.teacher * temperature) - lse_p + lse_q; break;
      case kReverseKl: value = reduction = sums.cross / (sums.at_t * temperature) - lse_q + lse_p; break;
      case kJs: second_pass<kJs>(terms, vocabulary, s, t, q, p, value, reduction); break;
      case kSkewKl: second_pass<kSkewKl>(terms, vocabulary, s, t, q, p, value, reduction); break;
      default: second_pass<kSkewReverseKl>(terms, vocabulary, s, t, q, p, value, reduction);
    }
  }
  double entropy = lse - (1 - smoothing) * static_cast<double>(entry(s, y));
  if (smoothing > 0) entropy -= smoothing / sums.count * sums.logits;
  *kd = static_cast<float>(value);
  *ce = static_cast<float>(entropy);
  stats[0] = static_cast<float>(lse);
  stats[step] = static_cast<float>(lse_q);
  stats[2 * step] = static_cast<float>(lse_p);
  stats[3 * step] = static_cast<float>(reduction);
  stats[4 * step] = static_cast<float>(sums.count);
}

}  // namespace distill
}  // namespace
