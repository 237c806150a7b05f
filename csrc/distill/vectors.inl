// Rows of logits as vectors of floats, and the exponential of a logit minus the greatest one.
#pragma once

#include <float.h>
#include <math.h>

#include "common/simd.h"
#include "distill/params.h"

namespace {
namespace distill {

using namespace cvmk::distill;
using simd::F;
using simd::I;
constexpr int kLanes = simd::kLanes;
constexpr int kBlock = 2048;  // logits that stay in the first-level cache from one loop to the next

// -- the exponential of a logit minus the greatest one ------------------------------------------------------------------------------
// exp(x) for x <= 1; 0 below -87.33, NaN for NaN. Relative error at most 1.1 ulp + 3e-9 |x|, where the rounding of x itself costs up to 6e-8 |x|.
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
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147182464599609375f), v);
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

CVMK_INLINE simd::H to_bf16(F x) {
#if defined(__AVX512BF16__)
  return simd::bits<simd::H>(_mm512_cvtneps_pbh(simd::bits<__m512>(x)));
#else
  return simd::to_bf16(x);
#endif
}

// -- rows, read and written a vector at a time: Kind says whether the vector is whole or its first n lanes ---------------------------------
struct Whole {
  static constexpr bool value = true;
};
struct Part {
  static constexpr bool value = false;
};

struct Floats {
  float* p;
  template <typename Kind>
  CVMK_INLINE F load(int64_t i, int n, Kind) const {
    return Kind::value ? simd::load(p + i) : simd::load_n(p + i, n);
  }
  template <typename Kind>
  CVMK_INLINE void store(int64_t i, int n, F x, Kind) const {
    if (Kind::value) simd::store(p + i, x);
    else simd::store_n(p + i, x, n);
  }
  CVMK_INLINE void prefetch(int64_t i) const { __builtin_prefetch(p + i); }
};

struct BFloats {
  uint16_t* p;
  template <typename Kind>
  CVMK_INLINE F load(int64_t i, int n, Kind) const {
    return simd::from_bf16(Kind::value ? simd::load_h(p + i) : simd::load_h_n(p + i, n));
  }
  template <typename Kind>
  CVMK_INLINE void store(int64_t i, int n, F x, Kind) const {
    const simd::H h = to_bf16(x);
    if (Kind::value) simd::store_h(p + i, h);
    else simd::store_h_n(p + i, h, n);
  }
  CVMK_INLINE void prefetch(int64_t i) const { __builtin_prefetch(p + i); }
};

// A row of any type, for half precision and for a student and a teacher of two types.
struct Any {
  void* p;
  int type;
  template <typename Kind>
  CVMK_INLINE F load(int64_t i, int n, Kind kind) const {
    if (type == kFloat32) return Floats{static_cast<float*>(p)}.load(i, n, kind);
    if (type == kBFloat16) return BFloats{static_cast<uint16_t*>(p)}.load(i, n, kind);
    const uint16_t* h = static_cast<uint16_t*>(p) + i;
    return simd::from_half(Kind::value ? simd::load_h(h) : simd::load_h_n(h, n));
  }
  template <typename Kind>
  CVMK_INLINE void store(int64_t i, int n, F x, Kind kind) const {
    if (type == kFloat32) return Floats{static_cast<float*>(p)}.store(i, n, x, kind);
    if (type == kBFloat16) return BFloats{static_cast<uint16_t*>(p)}.store(i, n, x, kind);
    uint16_t* h = static_cast<uint16_t*>(p) + i;
    if (Kind::value) simd::store_h(h, simd::to_half(x));
    else simd::store_h_n(h, simd::to_half(x), n);
  }
  CVMK_INLINE void prefetch(int64_t) const {}
};

// The row of any type as the other kinds of row.
CVMK_INLINE void view(void* p, int, Floats& row) { row.p = static_cast<float*>(p); }
CVMK_INLINE void view(void* p, int, BFloats& row) { row.p = static_cast<uint16_t*>(p); }
CVMK_INLINE void view(void* p, int type, Any& row) { row = Any{p, type}; }

template <typename Row>
CVMK_INLINE Row row_of(const Logits& logits, int64_t i) {
  Row row;
  view(const_cast<char*>(static_cast<const char*>(logits.data)) + i * logits.stride * (logits.type == kFloat32 ? 4 : 2), logits.type, row);
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
CVMK_INLINE F mix(F p, F q, float weight) { return simd::max(q + weight * (p - q), simd::set(FLT_MIN)); }

}  // namespace distill
}  // namespace
