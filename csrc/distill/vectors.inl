// Rows of logits as vectors of floats, and the exponential of a logit minus the greatest one.
#pragma once

#include <float.h>
#include <math.h>

#include "common/elements.h"
#include "distill/params.h"

namespace cvmk::distill {
namespace {

using simd::F;
using simd::I;
constexpr int kLanes = simd::kLanes;
constexpr int kBlock = 128 * kLanes;  // logits whose float32 sums go into one in float64: they stay in the first-level cache, and no lane adds more than 128
constexpr int kAhead = 512;           // how far ahead of a loop that writes logits are fetched
constexpr int kFirstBlock = 16 * kLanes;  // logits of a row that the first estimate of its greatest is from

// -- the exponential of a logit minus the greatest one ------------------------------------------------------------------------------
// exp(x) where it is at most 2^127, else a number that is not finite, or NaN; 0 below -104 (below -87.33 without AVX-512); NaN for NaN.
// Relative error at most 2 ulp + 3e-9 |x| where the result is a normal number; the rounding of x itself costs up to 6e-8 |x|.
#if defined(__AVX512F__)
// x = n ln 2 + r with n a multiple of 1/32, |r| <= ln(2) / 64: exp(x) = 2^floor(n) * table[32 frac(n)] * (1 + a r + b r^2), a and b such
// that the greatest relative error is least: 5.4e-8.
CVMK_INLINE F exp_below(F x) {
  const __m512 low = _mm512_setr_ps(1.0f, 1.0218971968f, 1.0442737341f, 1.0671404600f, 1.0905077457f, 1.1143867970f, 1.1387885809f, 1.1637248993f,
                                    1.1892070770f, 1.2152473927f, 1.2418577671f, 1.2690509558f, 1.2968395948f, 1.3252366781f, 1.3542555571f, 1.3839099407f);
  const __m512 high = _mm512_setr_ps(1.4142135382f, 1.4451807737f, 1.4768261909f, 1.5091644526f, 1.5422108173f, 1.5759809017f, 1.6104903221f, 1.6457555294f,
                                     1.6817928553f, 1.7186193466f, 1.7562521696f, 1.7947090864f, 1.8340080976f, 1.8741676807f, 1.9152065516f, 1.9571441412f);
  const __m512 magic = _mm512_set1_ps(393216.0f);  // 1.5 * 2^18: one unit in the last place is 1/32
  const __m512 v = _mm512_max_ps(_mm512_set1_ps(-105.0f), simd::bits<__m512>(x));  // the second operand where one is NaN
  const __m512 t = _mm512_fmadd_ps(v, _mm512_set1_ps(1.44269504088896341f), magic);
  F shifted = simd::bits<F>(t);
  __asm__("" : "+v"(shifted));  // the compiler must not simplify (x + magic) - magic
  const __m512 n = _mm512_sub_ps(simd::bits<__m512>(shifted), magic);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147182464599609375f), v);
  const __m512 power = _mm512_permutex2var_ps(low, simd::bits<__m512i>(shifted), high);
  const __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(0.50000006f), _mm512_set1_ps(1.00001466f));
  return simd::bits<F>(_mm512_scalef_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, power), power), n));
}
#else
CVMK_INLINE F exp_below(F above) {
  const F x = simd::min(simd::set(88.8f), above);  // what lies above gives infinity; NaN stays
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

// -- rows, read and written a vector at a time: Kind says whether the vector is whole or its first n lanes ---------------------------------
struct Whole {
  static constexpr bool value = true;
};
struct Part {
  static constexpr bool value = false;
};

// A row whose type is known. `streamed`: whole vectors are written past the caches, and lie at multiples of their size. kKeepExponentials: for loss
// and gradient in one pass it is quicker to keep the exponentials (8 bytes an entry in the cache) than to make them again; in float32 memory is
// what takes time.
template <Dtype kType, typename Element>
struct RowOf {
  static constexpr bool kKeepExponentials = kType == kBFloat16;
  Element* p;
  bool streamed = false;
  template <typename Kind>
  CVMK_INLINE F load(int64_t i, int n, Kind) const {
    return Kind::value ? elements::load<kType>(p + i) : elements::load_n<kType>(p + i, n);
  }
  template <typename Kind>
  CVMK_INLINE void store(int64_t i, int n, F x, Kind) const {
    if (!Kind::value) elements::store_n<kType>(p + i, x, n);
    else if (streamed) elements::stream<kType>(p + i, x);
    else elements::store<kType>(p + i, x);
  }
  CVMK_INLINE void prefetch(int64_t i) const { __builtin_prefetch(p + i); }
  // Numbers in front of the first vector that can be written past the caches.
  CVMK_INLINE int64_t head(int64_t most) const {
    const int64_t skip = streamed ? -static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / sizeof *p) & (kLanes - 1) : 0;
    return skip < most ? skip : most;
  }
};
typedef RowOf<kFloat32, float> Floats;
typedef RowOf<kBFloat16, uint16_t> BFloats;

// A row of any type, for half precision and for a student and a teacher of two types.
struct Any {
  static constexpr bool kKeepExponentials = false;
  void* p;
  Dtype dtype;
  bool lowered;
  bool streamed;  // not obeyed
  template <typename Kind>
  CVMK_INLINE F load(int64_t i, int n, Kind) const {
    const F x = Kind::value ? elements::load(p, dtype, i) : elements::load_n(p, dtype, i, n);
    return lowered ? simd::from_bf16(elements::round_bf16(x)) : x;
  }
  template <typename Kind>
  CVMK_INLINE void store(int64_t i, int n, F x, Kind) const {
    if (Kind::value) elements::store(p, dtype, i, x);
    else elements::store_n(p, dtype, i, x, n);
  }
  CVMK_INLINE void prefetch(int64_t) const {}
  CVMK_INLINE int64_t head(int64_t) const { return 0; }
};

CVMK_INLINE void view(void* p, const Logits&, Floats& row) { row.p = static_cast<float*>(p); }
CVMK_INLINE void view(void* p, const Logits&, BFloats& row) { row.p = static_cast<uint16_t*>(p); }
CVMK_INLINE void view(void* p, const Logits& logits, Any& row) { row.p = p, row.dtype = logits.dtype, row.lowered = logits.lowered; }

template <typename Row>
CVMK_INLINE Row row_of(const Logits& logits, int64_t i) {
  Row row;
  view(const_cast<char*>(elements::at(logits.data, logits.dtype, i * logits.stride)), logits, row);
  return row;
}

template <typename Row>
CVMK_INLINE float entry(const Row& row, int64_t i) {
  return row.load(i, 1, Part{})[0];
}

// body(i, n, kind) for the vectors of [begin, end).
template <typename Body>
CVMK_INLINE void vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, kLanes, Whole{});
  if (i < end) body(i, static_cast<int>(end - i), Part{});
}

// The same for [0, end), in vectors that begin `head` numbers from its beginning.
template <typename Body>
CVMK_INLINE void vectors_from(int64_t head, int64_t end, const Body& body) {
  if (head > 0) body(int64_t{0}, static_cast<int>(head), Part{});
  vectors(head, end, body);
}

CVMK_INLINE I lanes() {
  I lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}
// x with zeros in the lanes from n on of a vector that is not whole.
template <typename Kind>
CVMK_INLINE F within(F x, int n, Kind) {
  return Kind::value ? x : zero_where(lanes() >= simd::seti(n), x);
}

template <typename Row>
CVMK_INLINE float greatest(const Row& row, int64_t begin, int64_t end) {
  const F low = simd::set(-FLT_MAX);
  F a = low, b = low;
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    a = simd::max(row.load(i, kLanes, Whole{}), a);
    b = simd::max(row.load(i + kLanes, kLanes, Whole{}), b);
  }
  vectors(i, end, [&](int64_t j, int n, auto kind) __attribute__((always_inline)) {
    const F x = row.load(j, n, kind);
    a = simd::max(decltype(kind)::value ? x : simd::select(lanes() >= simd::seti(n), low, x), a);
  });
  return simd::max_lane(simd::max(a, b));
}

// p = exp(log_p), q = exp(log_q): weight p + (1 - weight) q, never 0, so that its logarithm and 1 / m exist where both are 0.
CVMK_INLINE F mix(F p, F q, float weight) { return simd::max(simd::set(FLT_MIN), q + weight * (p - q)); }

}  // namespace
}  // namespace cvmk::distill
