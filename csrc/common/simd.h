// Vectors of floats for the instruction set that the including file is compiled for: 16 lanes with AVX-512, 8 with AVX2, else 4.
//
// Written with the vector extensions of GCC and Clang, so one source serves every level; intrinsics only where those lack a word.
// Everything has internal linkage: a symbol that two files compiled for different levels could share would crash older processors.
// Multiply-adds are fused where the level has FMA (kernel files are compiled with -ffp-contract=fast).
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "common/inline.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {
namespace simd {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F __attribute__((vector_size(kLanes * 4)));
typedef int32_t I __attribute__((vector_size(kLanes * 4)));  // also the type of a comparison: all bits set where true
typedef uint32_t U __attribute__((vector_size(kLanes * 4)));
typedef uint16_t H __attribute__((vector_size(kLanes * 2)));

CVMK_INLINE F set(float x) { return x - F{}; }
CVMK_INLINE I seti(int32_t x) { return x - I{}; }

template <typename To, typename From>
CVMK_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

CVMK_INLINE F load(const float* p) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}
CVMK_INLINE void store(float* p, F v) { memcpy(p, &v, sizeof v); }

// The first n lanes (0 <= n <= kLanes); the others are 0, and memory behind them is not read.
CVMK_INLINE F load_n(const float* p, int n) {
#if defined(__AVX512F__)
  return bits<F>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p));
#else
  F v{};
  memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
#endif
}
CVMK_INLINE void store_n(float* p, F v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), bits<__m512>(v));
#else
  memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
#endif
}

// -- bfloat16 and half as raw 16-bit words ----------------------------------------------------------------------------------------
CVMK_INLINE F from_bf16(H h) { return bits<F>(__builtin_convertvector(h, U) << 16); }

// Round to nearest even; NaN stays NaN (quiet).
CVMK_INLINE H to_bf16(F x) {
  const U u = bits<U>(x);
  const U rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const U quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector((bits<I>(x != x) != 0) ? quiet : rounded, H);
}

CVMK_INLINE H load_h(const uint16_t* p) {
  H v;
  memcpy(&v, p, sizeof v);
  return v;
}
CVMK_INLINE H load_h_n(const uint16_t* p, int n) {
#if defined(__AVX512F__)
  return bits<H>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p));
#else
  H v{};
  memcpy(&v, p, static_cast<size_t>(n) * 2);
  return v;
#endif
}
CVMK_INLINE void store_h(uint16_t* p, H v) { memcpy(p, &v, sizeof v); }
CVMK_INLINE void store_h_n(uint16_t* p, H v, int n) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), bits<__m256i>(v));
#else
  memcpy(p, &v, static_cast<size_t>(n) * 2);
#endif
}

CVMK_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1Fu;
  const uint32_t mantissa = h & 0x3FFu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return bits<float>(sign | bits<uint32_t>(magnitude));
  }
  if (exponent == 31) return bits<float>(sign | 0x7F800000u | (mantissa << 13));
  return bits<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

CVMK_INLINE uint16_t float_to_half(float x) {  // round to nearest even
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                                             // below 2^-14: adding 0.5 leaves the subnormal in the low bits
    const float shifted = bits<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits<uint32_t>(shifted) - 0x3F000000u));
  }
  const uint32_t rounded = magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

CVMK_INLINE F from_half(H h) {
#if defined(__AVX512F__)
  return bits<F>(_mm512_cvtph_ps(bits<__m256i>(h)));
#elif defined(__F16C__)
  return bits<F>(_mm256_cvtph_ps(bits<__m128i>(h)));
#else
  F v{};
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(h[i]);
  return v;
#endif
}
CVMK_INLINE H to_half(F x) {
#if defined(__AVX512F__)
  return bits<H>(_mm512_cvtps_ph(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bits<H>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  H v{};
  for (int i = 0; i < kLanes; ++i) v[i] = float_to_half(x[i]);
  return v;
#endif
}

// -- arithmetic -----------------------------------------------------------------------------------------------------------------
CVMK_INLINE F select(I mask, F yes, F no) { return mask ? yes : no; }
CVMK_INLINE F max(F a, F b) { return a > b ? a : b; }  // b where a is NaN
CVMK_INLINE F min(F a, F b) { return a < b ? a : b; }  // b where a is NaN
CVMK_INLINE F abs(F a) { return bits<F>(bits<I>(a) & 0x7FFFFFFF); }

// Sums and maxima over the lanes, pairwise: the same order at every call.
CVMK_INLINE float sum(F v) {
  float a[kLanes];
  memcpy(a, &v, sizeof a);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) a[i] += a[i + step];
  return a[0];
}
CVMK_INLINE float max_lane(F v) {
  float a[kLanes];
  memcpy(a, &v, sizeof a);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) a[i] = a[i] > a[i + step] ? a[i] : a[i + step];
  return a[0];
}

// The same in the fastest order of the level.
CVMK_INLINE float sum_lanes(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(bits<__m512>(v));
#else
  return sum(v);
#endif
}
CVMK_INLINE float max_lanes(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(bits<__m512>(v));
#else
  return max_lane(v);
#endif
}

// The lanes before the n-th as they are, the others 0.
CVMK_INLINE F first_lanes(F v, int n) {
#if defined(__AVX512F__)
  return bits<F>(_mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1u), bits<__m512>(v)));
#else
  float lanes[kLanes];
  memcpy(lanes, &v, sizeof v);
  for (int i = n; i < kLanes; ++i) lanes[i] = 0.0f;
  return load(lanes);
#endif
}

// Nearest integer, halves to even, for |x| < 2^22.
CVMK_INLINE F round(F x) {
  const F magic = set(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits
  F t = x + magic;
  __asm__("" : "+x"(t));  // the compiler must not simplify (x + magic) - magic
  return t - magic;
}

// 2^n for an integral n in [-126, 127].
CVMK_INLINE F pow2i(F n) { return bits<F>((__builtin_convertvector(n, I) + 127) << 23); }

// exp(x). Relative error at most 1 ulp (6e-8) where the result is a normal number; below -87.33 the result is 0, above 88.72 it is infinite,
// NaN gives NaN. x = n ln 2 + r with |r| <= ln(2) / 2 (Cody & Waite 1980), a polynomial of degree 7 for exp(r), times 2^n.
CVMK_INLINE F exp(F x) {
  const F clamped = min(max(x, set(-87.336548f)), set(88.722839f));
  const F n = round(clamped * 1.44269504088896341f);
  const F r = (clamped - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  F p = set(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const F half = round(n * 0.5f);  // two factors, so that 2^128 does not overflow on the way
  F y = p * pow2i(half) * pow2i(n - half);
  y = x < -87.336548f ? F{} : y;
  y = x > 88.722839f ? set(__builtin_inff()) : y;
  return x == x ? y : x;
}

// exp(x) for x <= 0 in fewer steps: relative error 1e-7 beside the rounding of x log2(e), 0 below -87.7, NaN for NaN. A polynomial (minimax with a fixed
// constant term) on half an octave.
CVMK_INLINE F falling_exp(F x) {
  const F magic = set(12583039.0f);  // 1.5 * 2^23 + 127: the sum's low bits are the exponent with its bias
  const F scaled = x * 1.4426950408889634f;
  const F y = max(set(-127.0f), scaled);
  const F shifted = y + magic;
  const F f = y - (shifted - magic);
  F p = set(1.5353361959569156e-4f);
  p = p * f + 1.3398875016719103e-3f;
  p = p * f + 9.61843691766262e-3f;
  p = p * f + 5.5503323674201965e-2f;
  p = p * f + 2.4022647738456726e-1f;
  p = p * f + 6.931471824645996e-1f;
  p = p * f + 1.0f;
  return p * bits<F>(bits<I>(shifted) << 23);
}

// log(x) for normal x > 0, relative error about 1 ulp, and NaN for NaN (log x = n ln 2 + log m, m in [sqrt(1/2), sqrt(2)); polynomial of degree 9).
CVMK_INLINE F log(F x) {
  I e = (bits<I>(x) >> 23) - 126;
  F m = bits<F>((bits<I>(x) & 0x007FFFFF) | 0x3F000000);  // in [0.5, 1)
  const I small = m < 0.707106781186547524f;
  e = small ? e - 1 : e;
  m = (small ? m + m : m) - 1.0f;
  const F n = __builtin_convertvector(e, F);
  const F z = m * m;
  F p = set(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z;
  p = p + n * -2.12194440e-4f;
  p = p - 0.5f * z;
  return x == x ? m + p + n * 0.693359375f : x;
}

}  // namespace simd
}  // namespace
