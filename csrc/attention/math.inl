// Powers of two, tanh and rows for the attention kernels.
#pragma once
#include <stdint.h>
#include <string.h>

#include "attention/params.h"
#include "common/amx.h"
#include "common/dropout.h"
#include "common/elements.h"
#include "common/simd.h"

namespace cvmk::attention {
namespace {

using simd::F;
using simd::H;
using simd::I;
using simd::U;
using simd::max_lanes;
using simd::sum_lanes;
constexpr int kLanes = simd::kLanes;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInf = __builtin_inff();

CVMK_INLINE I lane_index() {
  I v{};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// The larger; b where either is NaN.
CVMK_INLINE F larger(F a, F b) {
#if defined(__AVX512F__)
  return simd::bits<F>(_mm512_max_ps(simd::bits<__m512>(a), simd::bits<__m512>(b)));
#else
  return simd::max(a, b);
#endif
}

// 2^x for x <= 127: 0 below -126.5 (also for -inf), NaN stays NaN, 2^0 is exactly 1. Relative error of the polynomial (minimax with a fixed
// constant term on [-1/2, 1/2]): kPrecise 2e-9, so that rounding decides (1 ulp); else 3e-6, for results that are rounded to bfloat16.
template <bool kPrecise>
CVMK_INLINE F exp2(F x) {
  // 1.5 * 2^23 + 127: the low bits of the sum are the nearest integer plus the bias of the exponent, 0 where x is -127.
  const F magic = simd::set(12583039.0f);
  x = larger(simd::set(-127.0f), x);
  const F shifted = x + magic;
  const F f = x - (shifted - magic);
  F p;
  if (kPrecise) {
    p = simd::set(1.5353361959569156e-4f);
    p = p * f + 1.3398875016719103e-3f;
    p = p * f + 9.61843691766262e-3f;
    p = p * f + 5.5503323674201965e-2f;
    p = p * f + 2.4022647738456726e-1f;
    p = p * f + 6.931471824645996e-1f;
  } else {
    p = simd::set(9.582852944731712e-3f);
    p = p * f + 5.5906426161527634e-2f;
    p = p * f + 2.4024099111557007e-1f;
    p = p * f + 6.931241750717163e-1f;
  }
  p = p * f + 1.0f;
  return p * simd::bits<F>(simd::bits<I>(shifted) << 23);
}

// tanh, relative error about 2 ulp: an odd polynomial below 0.625 (Cephes), 1 - 2 / (e^2x + 1) above.
CVMK_INLINE F tanh(F x) {
  const F a = simd::abs(x);
  const F z = x * x;
  F p = simd::set(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const F small = p * z * x + x;
  const F far = a > 10.0f ? simd::set(10.0f) : a;
  const F big = 1.0f - 2.0f / (exp2<true>(far * (2.0f * kLog2E)) + 1.0f);
  const F y = a < 0.625f ? small : (x < 0.0f ? -big : big);
  return x == x ? y : x;
}

CVMK_INLINE int64_t at(const Integers& x, int64_t i) { return integer_at(x.data, x.dtype, i * x.stride); }

CVMK_INLINE const char* row_of(const Matrix& m, int64_t width, int64_t b, int64_t h, int64_t t) {
  return static_cast<const char*>(m.data) + (b * m.batch + h * m.head + t * m.row) * width;
}
CVMK_INLINE char* row_of_mutable(const Matrix& m, int64_t width, int64_t b, int64_t h, int64_t t) {
  return static_cast<char*>(m.data) + (b * m.batch + h * m.head + t * m.row) * width;
}

}  // namespace
}  // namespace cvmk::attention
