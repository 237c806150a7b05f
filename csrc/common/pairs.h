// Products of bfloat16 in pairs, summed in float32, where the processor has AVX512_BF16. The level avx512 does not promise it, so whoever calls these has asked
// `dispatch().features` first; a compiler that does not know it is told by the instruction itself.
#pragma once

#include "common/simd.h"

#if defined(__AVX512F__)

namespace cvmk {
namespace {
namespace pairs {

using simd::F;

// sum += both products of each lane's pairs. Subnormal numbers count as 0.
CVMK_INLINE F dot2(F sum, __m512i a, __m512i b) {
#if defined(__AVX512BF16__)
  return simd::bits<F>(_mm512_dpbf16_ps(simd::bits<__m512>(sum), simd::bits<__m512bh>(a), simd::bits<__m512bh>(b)));
#else
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#endif
}

// To the nearest bfloat16, subnormal numbers to 0.
CVMK_INLINE __m256i narrow(F x) {
#if defined(__AVX512BF16__)
  return simd::bits<__m256i>(_mm512_cvtneps_pbh(simd::bits<__m512>(x)));
#else
  __m256i h;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(x));
  return h;
#endif
}

}  // namespace pairs
}  // namespace
}  // namespace cvmk

#endif
