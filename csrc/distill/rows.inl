// One row of the distillation loss: its statistics and losses, and its gradient. Everything is computed in float32, sums over a row in
// float64 from sums over blocks of it, in an order that depends on nothing but the vocabulary.
//
// A block of kBlock logits is found in the first-level cache by every loop after the first; a row is read from memory once.

#include <float.h>
#include <math.h>

#include "common/simd.h"
#include "common/threads.h"
#include "distill/params.h"

namespace {
namespace distill {

using namespace cvmk::distill;
using simd::F;
using simd::I;
constexpr int kLanes = simd::kLanes;
constexpr int kBlock = 2048;

// -- the exponential of a logit minus the greatest one ------------------------------------------------------------------------------
// exp(x) for x <= 1, error at most 1.1 ulp; 0 below -87.33, NaN for NaN. Where `zero` is true the result is 0.
#if defined(__AVX512F__)
// x = n ln 2 + r with n a multiple of 1/16, |r| <= ln(2) / 32: exp(x) = 2^floor(n) * table[16 frac(n)] * (1 + r + r^2/2 + r^3/6).
CVMK_INLINE F exp_below(F x) {
  const __m512 v = simd::bits<__m512>(x);
  const __m512 table = _mm512_setr_ps(1.0f, 1.044273782427413840f, 1.090507732665257659f, 1.138788634756691653f, 1.189207115002721067f, 1.241857812073484002f,
                                      1.296839554651009666f, 1.354255546936892728f, 1.414213562373095049f, 1.476826145939499311f, 1.542210825407940824f,
                                      1.610490331949254308f, 1.681792830507429086f, 1.756252160373299483f, 1.834008086409342463f, 1.915206561397147294f);
  const __m512 magic = _mm512_set1_ps(786432.0f);  // 1.5 * 2^19: one unit in the last place is 1/16
  const __m512 t = _mm512_fmadd_ps(v, _mm512_set1_ps(1.44269504088896341f), magic);
  F shifted = simd::bits<F>(t);
  __asm__("" : "+v"(shifted));  // the compiler must not simplify (x + magic) - magic
  const __m512 n = _mm512_sub_ps(simd::bits<__m512>(shifted), magic);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147182464599609375f), v);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-1.904654323148236017e-9f), r);
  const __m512 power = _mm512_permutexvar_ps(simd::bits<__m512i>(shifted), table);
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(0.166666672f), _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
  p = _mm512_fmadd_ps(p, power, power);
  const __mmask16 normal = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-87.336548f), _CMP_NLT_UQ);
  return simd::bits<F>(_mm512_maskz_scalef_ps(normal, p, n));
}
#else
CVMK_INLINE F exp_below(F x) {
  const F n = simd::round(x * 1.44269504088896341f);
  const F r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  F p = simd::set(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const F y = p * simd::pow2i(n);
  return x < -87.336548f ? F{} : y;
}
#endif

CVMK_INLINE F zero_where(I condition, F x) { return condition ? F{} : x; }

// -- blocks of a row ------------------------------------------------------------------------------------------------------------------
CVMK_INLINE int size_of(int type) { return type == kFloat32 ? 4 : 2; }

CVMK_INLINE const void* row_of(const Logits& logits, int64_t row) {
  return static_cast<const char*>(logits.data) + row * logits.stride * size_of(logits.type);
}

// Logits [from, from + n) of a row as floats: in place, or converted to `scratch`.
CVMK_INLINE const float* block_of(const void* row, int type, int64_t from, int n, float* scratch) {
  if (type == kFloat32) return static_cast<const float*>(row) + from;
  const uint16_t* p = static_cast<const uint16_t*>(row) + from;
  int i = 0;
  if (type == kBFloat16) {
    for (; i + kLanes <= n; i += kLanes) simd::store(scratch + i, simd::from_bf16(simd::load_h(p + i)));
    if (i < n) simd::store_n(scratch + i, simd::from_bf16(simd::load_h_n(p + i, n - i)), n - i);
  } else {
    for (; i + kLanes <= n; i += kLanes) simd::store(scratch + i, simd::from_half(simd::load_h(p + i)));
    if (i < n) simd::store_n(scratch + i, simd::from_half(simd::load_h_n(p + i, n - i)), n - i);
  }
  return scratch;
}

CVMK_INLINE float entry(const void* row, int type, int64_t i) {
  float value[kLanes];
  return *block_of(row, type, i, 1, value);
}

// body(i, n, all): vectors of the block; `all` is a constant true where n == kLanes.
struct Whole {
  static constexpr bool value = true;
};
struct Part {
  static constexpr bool value = false;
};
template <typename Body>
CVMK_INLINE void vectors(int n, const Body& body) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes, Whole{});
  if (i < n) body(i, n - i, Part{});
}
template <typename Kind>
CVMK_INLINE F load(const float* p, int n, Kind) {
  return Kind::value ? simd::load(p) : simd::load_n(p, n);
}
// The lanes from n on, for vectors that are not whole.
CVMK_INLINE I beyond(int n) {
  I lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane >= simd::seti(n);
}
template <typename Kind>
CVMK_INLINE F within(F x, int n, Kind) {
  return Kind::value ? x : zero_where(beyond(n), x);
}

CVMK_INLINE float block_max(const float* x, int n) {
  const F low = simd::set(-FLT_MAX);
  F a = low, b = low, c = low, d = low;
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a = simd::max(simd::load(x + i), a);
    b = simd::max(simd::load(x + i + kLanes), b);
    c = simd::max(simd::load(x + i + 2 * kLanes), c);
    d = simd::max(simd::load(x + i + 3 * kLanes), d);
  }
  for (; i + kLanes <= n; i += kLanes) a = simd::max(simd::load(x + i), a);
  if (i < n) a = simd::max(simd::select(beyond(n - i), low, simd::load_n(x + i, n - i)), a);
  return simd::max_lane(simd::max(simd::max(a, b), simd::max(c, d)));
}

// A sum of exp((x - maximum) / T) times something, over blocks whose maximum may rise.
struct Online {
  double total = 0;
  CVMK_INLINE void rescale(double factor) { total = factor == 0 ? 0 : total * factor; }
};

// -- statistics and losses ------------------------------------------------------------------------------------------------------------
enum Temperature { kAtOne, kAtTwo, kAtAny };
enum Kind { kNoTeacher, kForward, kReverse, kOther };

struct Sums {
  float top_s = -FLT_MAX, top_t = -FLT_MAX;
  Online at_one, at_t, teacher, cross;
  double logits = 0, count = 0;
};

// Adds a block. at_one: sum exp(s - top_s); at_t: sum exp((s - top_s) / T); teacher: sum exp((t - top_t) / T); cross: for kForward
// sum exp((t - top_t) / T) (t - s), for kReverse sum exp((s - top_s) / T) (s - t), with 0 * inf = 0.
template <int kTemperature, int kKind>
CVMK_INLINE void add_block(Sums& sums, const float* s, const float* t, int n, float inverse, const char* next_s, const char* next_t, int ahead) {
  const float top_s = block_max(s, n);
  if (top_s > sums.top_s) {
    const double fall = static_cast<double>(sums.top_s) - top_s;
    sums.at_one.rescale(::exp(fall));
    const double factor = ::exp(fall * inverse);
    sums.at_t.rescale(factor);
    if (kKind == kReverse) sums.cross.rescale(factor);
    sums.top_s = top_s;
  }
  if (kKind != kNoTeacher) {
    const float top_t = block_max(t, n);
    if (top_t > sums.top_t) {
      const double factor = ::exp((static_cast<double>(sums.top_t) - top_t) * inverse);
      sums.teacher.rescale(factor);
      if (kKind == kForward) sums.cross.rescale(factor);
      sums.top_t = top_t;
    }
  }
  const F max_s = simd::set(sums.top_s), max_t = simd::set(sums.top_t), scale = simd::set(inverse);
  F one{}, at_t{}, teacher{}, cross{};
  vectors(n, [&](int i, int m, auto kind) __attribute__((always_inline)) {
    __builtin_prefetch(next_s + static_cast<int64_t>(i) * ahead);
    const F z = load(s + i, m, kind);
    const F a = z - max_s;
    const F e = within(exp_below(kTemperature == kAtOne ? a : a * scale), m, kind);
    at_t += e;
    if (kTemperature == kAtTwo) one += e * e;
    if (kTemperature == kAtAny) one += within(exp_below(a), m, kind);
    if (kKind != kNoTeacher) {
      __builtin_prefetch(next_t + static_cast<int64_t>(i) * ahead);
      const F w = load(t + i, m, kind);
      const F b = w - max_t;
      const F p = within(exp_below(kTemperature == kAtOne ? b : b * scale), m, kind);
      teacher += p;
      if (kKind == kForward) cross += p * zero_where(p == F{}, w - z);
      if (kKind == kReverse) cross += e * zero_where(e == F{}, z - w);
    }
  });
  sums.at_t.total += static_cast<double>(simd::sum(at_t));
  if (kTemperature != kAtOne) sums.at_one.total += static_cast<double>(simd::sum(one));
  if (kKind != kNoTeacher) sums.teacher.total += static_cast<double>(simd::sum(teacher));
  if (kKind == kForward || kKind == kReverse) sums.cross.total += static_cast<double>(simd::sum(cross));
}

// For label smoothing: the sum and the count of the logits that are not -inf.
CVMK_INLINE void add_logits(Sums& sums, const float* s, int n) {
  F total{}, count{};
  const F low = simd::set(-__builtin_inff());
  vectors(n, [&](int i, int m, auto kind) __attribute__((always_inline)) {
    const F z = load(s + i, m, kind);
    const I absent = z == low;
    total += zero_where(absent, z);
    count += within(zero_where(absent, simd::set(1.0f)), m, kind);
  });
  sums.logits += static_cast<double>(simd::sum(total));
  sums.count += static_cast<double>(simd::sum(count));
}

struct Buffers {
  alignas(64) float s[kBlock], t[kBlock], g[kBlock];
};

template <int kTemperature, int kKind>
void first_pass(const Rows& in, const void* student, const void* teacher, Buffers& buffers, Sums& sums) {
  const int64_t bytes_s = size_of(in.student.type), bytes_t = size_of(in.teacher.type);
  const float inverse = 1.0f / in.terms.temperature;
  for (int64_t from = 0; from < in.vocabulary; from += kBlock) {
    const int n = static_cast<int>(in.vocabulary - from < kBlock ? in.vocabulary - from : kBlock);
    const float* s = block_of(student, in.student.type, from, n, buffers.s);
    const float* t = kKind == kNoTeacher ? nullptr : block_of(teacher, in.teacher.type, from, n, buffers.t);
    const char* next_s = static_cast<const char*>(student) + (from + kBlock) * bytes_s;
    const char* next_t = kKind == kNoTeacher ? nullptr : static_cast<const char*>(teacher) + (from + kBlock) * bytes_t;
    add_block<kTemperature, kKind>(sums, s, t, n, inverse, next_s, next_t, static_cast<int>(bytes_s));
    if (in.terms.smoothing > 0) add_logits(sums, s, n);
  }
  if (kTemperature == kAtOne) sums.at_one = sums.at_t;
}

// p = exp(log_p), q = exp(log_q) and the mixture m, which is never 0, so that its logarithm and 1 / m exist where both are 0.
CVMK_INLINE F mix(F p, F q, float weight) { return simd::max(q + weight * (p - q), simd::set(FLT_MIN)); }

// The divergences of a mixture need both log-sum-exps first: value D and the reduction R of one row.
template <int kDivergence>
void second_pass(const Rows& in, const void* student, const void* teacher, Buffers& buffers, float lse_q, float lse_p, double& value, double& reduction) {
  const float inverse = 1.0f / in.terms.temperature, weight = in.terms.mixture;
  double first = 0, second = 0;
  for (int64_t from = 0; from < in.vocabulary; from += kBlock) {
    const int n = static_cast<int>(in.vocabulary - from < kBlock ? in.vocabulary - from : kBlock);
    const float* s = block_of(student, in.student.type, from, n, buffers.s);
    const float* t = block_of(teacher, in.teacher.type, from, n, buffers.t);
    F a{}, b{};
    vectors(n, [&](int i, int m, auto kind) __attribute__((always_inline)) {
      const F log_q = load(s + i, m, kind) * inverse - lse_q, log_p = load(t + i, m, kind) * inverse - lse_p;
      const F q = exp_below(log_q), p = exp_below(log_p);
      F x, y;
      if (kDivergence == kJs) {
        const F log_m = simd::log(mix(p, q, weight));
        x = p * zero_where(p == F{}, log_p - log_m);
        y = q * zero_where(q == F{}, log_q - log_m);
      } else if (kDivergence == kSkewKl) {
        const F mixed = mix(p, q, weight);
        x = p * zero_where(p == F{}, log_p - simd::log(mixed));
        y = q * (p / mixed);
      } else {
        const F mixed = mix(q, p, weight);
        x = q * zero_where(q == F{}, log_q - simd::log(mixed));
        y = q * (q / mixed);
      }
      a += within(x, m, kind);
      b += within(y, m, kind);
    });
    first += static_cast<double>(simd::sum(a));
    second += static_cast<double>(simd::sum(b));
  }
  const double w = static_cast<double>(weight);
  if (kDivergence == kJs) {
    reduction = (1 - w) * second;
    value = w * first + reduction;
  } else if (kDivergence == kSkewKl) {
    value = first;
    reduction = (w - 1) * second;
  } else {
    value = first;
    reduction = value + 1 - w * second;
  }
}

template <int kKind>
CVMK_INLINE void first_pass_at(const Rows& in, const void* student, const void* teacher, Buffers& buffers, Sums& sums) {
  const float temperature = in.terms.temperature;
  if (temperature == 1.0f || kKind == kNoTeacher) return first_pass<kAtOne, kKind>(in, student, teacher, buffers, sums);
  if (temperature == 2.0f) return first_pass<kAtTwo, kKind>(in, student, teacher, buffers, sums);
  first_pass<kAtAny, kKind>(in, student, teacher, buffers, sums);
}

// Row `row` of student and teacher logits at the given places: writes its statistics, returns its two losses.
void row_losses(const Rows& in, int64_t row, const void* student, const void* teacher, int64_t y, Buffers& buffers, float* kd, float* ce) {
  Sums sums;
  const Terms& terms = in.terms;
  const bool with_teacher = teacher != nullptr;
  const bool forward = terms.divergence == kForwardKl, reverse = terms.divergence == kReverseKl;
  if (!with_teacher) first_pass_at<kNoTeacher>(in, student, teacher, buffers, sums);
  else if (forward) first_pass_at<kForward>(in, student, teacher, buffers, sums);
  else if (reverse) first_pass_at<kReverse>(in, student, teacher, buffers, sums);
  else first_pass_at<kOther>(in, student, teacher, buffers, sums);

  const double t = static_cast<double>(terms.temperature);
  const double lse = static_cast<double>(sums.top_s) + ::log(sums.at_one.total);
  double lse_q = lse, lse_p = 0, value = 0, reduction = 0;
  if (with_teacher) {
    lse_q = static_cast<double>(sums.top_s) / t + ::log(sums.at_t.total);
    lse_p = static_cast<double>(sums.top_t) / t + ::log(sums.teacher.total);
    const float q = static_cast<float>(lse_q), p = static_cast<float>(lse_p);
    if (forward) value = sums.cross.total / (sums.teacher.total * t) - lse_p + lse_q;
    else if (reverse) value = reduction = sums.cross.total / (sums.at_t.total * t) - lse_q + lse_p;
    else if (terms.divergence == kJs) second_pass<kJs>(in, student, teacher, buffers, q, p, value, reduction);
    else if (terms.divergence == kSkewKl) second_pass<kSkewKl>(in, student, teacher, buffers, q, p, value, reduction);
    else second_pass<kSkewReverseKl>(in, student, teacher, buffers, q, p, value, reduction);
  }
  const double smoothing = static_cast<double>(terms.smoothing);
  double entropy = lse - (1 - smoothing) * static_cast<double>(entry(student, in.student.type, y));
  if (smoothing > 0) entropy -= smoothing / sums.count * sums.logits;
  *kd = static_cast<float>(value);
  *ce = static_cast<float>(entropy);
  float* stats = in.stats + row;
  stats[0] = static_cast<float>(lse);
  stats[in.rows] = static_cast<float>(lse_q);
  stats[2 * in.rows] = static_cast<float>(lse_p);
  stats[3 * in.rows] = static_cast<float>(reduction);
  stats[4 * in.rows] = static_cast<float>(sums.count);
}

// -- gradients --------------------------------------------------------------------------------------------------------------------------
// What a row's gradient is made of besides the logits.
struct Slope {
  float inverse, lse, lse_q, lse_p, reduction, mixture;
  float kd_scale, ce_scale;
  float square;  // softmax(z) = square * softmax(z / 2)^2
  float shared;  // ce_scale * smoothing / V'
};

// The block's gradient but for the target's own entry. Only kCe: no teacher is read.
template <int kTemperature, int kDivergence, bool kKd, bool kCe>
CVMK_INLINE void gradient_block(const Slope& w, const float* s, const float* t, int n, float* out) {
  vectors(n, [&](int i, int m, auto kind) __attribute__((always_inline)) {
    const F z = load(s + i, m, kind);
    F grad{};
    if (kKd) {
      const F log_q = z * w.inverse - w.lse_q, log_p = load(t + i, m, kind) * w.inverse - w.lse_p;
      const F q = exp_below(log_q), p = exp_below(log_p);
      F slope{};
      if (kDivergence == kForwardKl) {
        grad = (q - p) * w.kd_scale;
      } else {
        if (kDivergence == kReverseKl) slope = zero_where(q == F{}, log_q - log_p);
        if (kDivergence == kJs) slope = zero_where(q == F{}, log_q - simd::log(mix(p, q, w.mixture))) * (1 - w.mixture);
        if (kDivergence == kSkewKl) slope = p / mix(p, q, w.mixture) * (w.mixture - 1);
        if (kDivergence == kSkewReverseKl) {
          const F mixed = mix(q, p, w.mixture);
          slope = zero_where(q == F{}, log_q - simd::log(mixed)) + 1.0f - q / mixed * w.mixture;
        }
        grad = q * ((slope - w.reduction) * w.kd_scale);
      }
      if (kCe && kTemperature == kAtOne) grad += q * w.ce_scale;
      if (kCe && kTemperature == kAtTwo) grad += q * q * (w.ce_scale * w.square);
    }
    if (kCe && (!kKd || kTemperature == kAtAny)) grad += exp_below(z - w.lse) * w.ce_scale;
    if constexpr (decltype(kind)::value) simd::store(out + i, grad);
    else simd::store_n(out + i, grad, m);
  });
}

// Label smoothing: the same for every entry that is not -inf.
CVMK_INLINE void subtract_shared(float shared, const float* s, int n, float* out) {
  const F low = simd::set(-__builtin_inff());
  vectors(n, [&](int i, int m, auto kind) __attribute__((always_inline)) {
    const F grad = load(out + i, m, kind) - zero_where(load(s + i, m, kind) == low, simd::set(shared));
    if constexpr (decltype(kind)::value) simd::store(out + i, grad);
    else simd::store_n(out + i, grad, m);
  });
}

CVMK_INLINE void write_block(const float* grad, int n, int type, void* row, int64_t from) {
  uint16_t* p = static_cast<uint16_t*>(row) + from;
  if (type == kBFloat16) {
    vectors(n, [&](int i, int m, auto kind) __attribute__((always_inline)) {
      const simd::H h = simd::to_bf16(load(grad + i, m, kind));
      if constexpr (decltype(kind)::value) simd::store_h(p + i, h);
      else simd::store_h_n(p + i, h, m);
    });
  } else {
    vectors(n, [&](int i, int m, auto kind) __attribute__((always_inline)) {
      const simd::H h = simd::to_half(load(grad + i, m, kind));
      if constexpr (decltype(kind)::value) simd::store_h(p + i, h);
      else simd::store_h_n(p + i, h, m);
    });
  }
}

template <int kTemperature, int kDivergence, bool kKd, bool kCe>
void gradient_row(const Rows& in, const Slope& slope, const void* student, const void* teacher, int64_t y, float at_target, int type, void* out,
                  Buffers& buffers) {
  for (int64_t from = 0; from < in.vocabulary; from += kBlock) {
    const int n = static_cast<int>(in.vocabulary - from < kBlock ? in.vocabulary - from : kBlock);
    const float* s = block_of(student, in.student.type, from, n, buffers.s);
    const float* t = kKd ? block_of(teacher, in.teacher.type, from, n, buffers.t) : nullptr;
    float* grad = type == kFloat32 ? static_cast<float*>(out) + from : buffers.g;
    gradient_block<kTemperature, kDivergence, kKd, kCe>(slope, s, t, n, grad);
    if (kCe && slope.shared != 0) subtract_shared(slope.shared, s, n, grad);
    if (kCe && y >= from && y < from + n) grad[y - from] -= at_target;
    if (type != kFloat32) write_block(grad, n, type, out, from);
  }
}

template <int kDivergence, bool kCe>
CVMK_INLINE void gradient_row_at(const Rows& in, const Slope& slope, const void* student, const void* teacher, int64_t y, float at_target, int type, void* out,
                                 Buffers& buffers) {
  const float temperature = in.terms.temperature;
  if (temperature == 1.0f) gradient_row<kAtOne, kDivergence, true, kCe>(in, slope, student, teacher, y, at_target, type, out, buffers);
  else if (temperature == 2.0f) gradient_row<kAtTwo, kDivergence, true, kCe>(in, slope, student, teacher, y, at_target, type, out, buffers);
  else gradient_row<kAtAny, kDivergence, true, kCe>(in, slope, student, teacher, y, at_target, type, out, buffers);
}

template <int kDivergence>
CVMK_INLINE void gradient_row_of(bool with_ce, const Rows& in, const Slope& slope, const void* student, const void* teacher, int64_t y, float at_target,
                                 int type, void* out, Buffers& buffers) {
  if (with_ce) gradient_row_at<kDivergence, true>(in, slope, student, teacher, y, at_target, type, out, buffers);
  else gradient_row_at<kDivergence, false>(in, slope, student, teacher, y, at_target, type, out, buffers);
}

// The gradient of row `row`, whose logits are at the given places, written to `out` as `type`. With neither scale: zeros.
void row_gradient(const Rows& in, int64_t row, const void* student, const void* teacher, int64_t y, bool with_kd, bool with_ce, float kd_scale,
                  float ce_scale, int type, void* out, Buffers& buffers) {
  const float* stats = in.stats + row;
  const Terms& terms = in.terms;
  Slope slope;
  slope.inverse = 1.0f / terms.temperature;
  slope.lse = stats[0];
  slope.lse_q = stats[in.rows];
  slope.lse_p = stats[2 * in.rows];
  slope.reduction = stats[3 * in.rows];
  slope.mixture = terms.mixture;
  slope.kd_scale = kd_scale;
  slope.ce_scale = ce_scale;
  slope.square = static_cast<float>(::exp(2.0 * static_cast<double>(slope.lse_q) - static_cast<double>(slope.lse)));
  slope.shared = terms.smoothing > 0 ? ce_scale * (terms.smoothing / stats[4 * in.rows]) : 0.0f;
  const float at_target = (1.0f - terms.smoothing) * ce_scale;
  if (!with_kd) {
    if (with_ce) gradient_row<kAtOne, kForwardKl, false, true>(in, slope, student, teacher, y, at_target, type, out, buffers);
    return;
  }
  switch (terms.divergence) {
    case kForwardKl: return gradient_row_of<kForwardKl>(with_ce, in, slope, student, teacher, y, at_target, type, out, buffers);
    case kReverseKl: return gradient_row_of<kReverseKl>(with_ce, in, slope, student, teacher, y, at_target, type, out, buffers);
    case kJs: return gradient_row_of<kJs>(with_ce, in, slope, student, teacher, y, at_target, type, out, buffers);
    case kSkewKl: return gradient_row_of<kSkewKl>(with_ce, in, slope, student, teacher, y, at_target, type, out, buffers);
    default: return gradient_row_of<kSkewReverseKl>(with_ce, in, slope, student, teacher, y, at_target, type, out, buffers);
  }
}

// -- all rows -----------------------------------------------------------------------------------------------------------------------------
// Rows of a work item: about 64 thousand logits.
CVMK_INLINE int64_t rows_of_item(int64_t vocabulary) { return vocabulary >= 65536 ? 1 : 65536 / vocabulary; }

template <typename Body>
CVMK_INLINE void each_row(const Rows& in, const Body& body) {
  const int64_t size = rows_of_item(in.vocabulary);
  threads::each((in.rows + size - 1) / size, [&](int64_t item) {
    Buffers buffers;
    const int64_t end = (item + 1) * size < in.rows ? (item + 1) * size : in.rows;
    for (int64_t row = item * size; row < end; ++row) body(row, buffers);
  });
}

void losses(const LossPass& pass) {
  const Rows& in = pass.in;
  each_row(in, [&](int64_t row, Buffers& buffers) {
    const int64_t y = in.target[row];
    if (y < 0) {
      pass.kd[row] = pass.ce[row] = 0;
      for (int i = 0; i < 5; ++i) in.stats[i * in.rows + row] = 0;
      return;
    }
    const void* teacher = in.teacher.data == nullptr ? nullptr : row_of(in.teacher, row);
    row_losses(in, row, row_of(in.student, row), teacher, y, buffers, pass.kd + row, pass.ce + row);
  });
}

void gradients(const GradientPass& pass) {
  const Rows& in = pass.in;
  const int64_t bytes = in.vocabulary * size_of(in.student.type);
  each_row(in, [&](int64_t row, Buffers& buffers) {
    const int64_t y = in.target[row];
    void* out = static_cast<char*>(pass.gradient) + row * bytes;
    if (y < 0 || !(pass.with_kd || pass.with_ce)) {
      memset(out, 0, static_cast<size_t>(bytes));
      return;
    }
    const void* teacher = pass.with_kd ? row_of(in.teacher, row) : nullptr;
    row_gradient(in, row, row_of(in.student, row), teacher, y, pass.with_kd, pass.with_ce, pass.kd_scale, pass.ce_scale, in.student.type, out, buffers);
  });
}

}  // namespace distill
}  // namespace
