// Products of bytes, four of a lane at a time, summed in int32: vpdpbusd where the processor has AVX512_VNNI. The level avx512 does not promise it, so whoever asks
// for it has asked `dispatch().features` first.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds it in its own intrinsics (its bug 105593)
#endif

#include "common/simd.h"

namespace cvmk {
namespace {
namespace quads {

using simd::I;

// sum[lane] += the four products of the bytes of a's and b's word there. a is unsigned (value + 128) for kVnni, else signed; none is -128.
template <bool kVnni>
CVMK_INLINE I dot4(I sum, I a, I b) {
#if defined(__AVX512VNNI__)
  if (kVnni) return simd::bits<I>(_mm512_dpbusd_epi32(simd::bits<__m512i>(sum), simd::bits<__m512i>(a), simd::bits<__m512i>(b)));
#elif defined(__AVX512F__)
  if (kVnni) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
#endif
#if defined(__AVX512F__)
  const __m512i x = simd::bits<__m512i>(a), w = simd::bits<__m512i>(b);
  const __m512i signed_w = _mm512_mask_sub_epi8(w, _mm512_movepi8_mask(x), _mm512_setzero_si512(), w);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(x), signed_w);  // at most 2 * 127 * 127: no saturation
  return sum + simd::bits<I>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
  const __m256i x = simd::bits<__m256i>(a), w = simd::bits<__m256i>(b);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));  // at most 2 * 127 * 127: no saturation
  return sum + simd::bits<I>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  // Shifts bring byte j of every word into its sign; arithmetic ones extend it.
  for (int j = 0; j < 4; ++j) sum += ((a << (24 - 8 * j)) >> 24) * ((b << (24 - 8 * j)) >> 24);
  return sum;
#endif
}

}  // namespace quads
}  // namespace
}  // namespace cvmk
