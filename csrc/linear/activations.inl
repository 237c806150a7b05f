// Activations and their derivatives on vectors of pre-activations, and the bits that a relu leaves behind.
#pragma once
#include "common/elements.h"
#include "common/simd.h"
#include "linear/params.h"

namespace cvmk::linear {
namespace {

using simd::F;
using simd::I;
using simd::U;
using simd::kLanes;

CVMK_INLINE F sigmoid(F y) { return 1.0f / (1.0f + simd::exp(-y)); }

// Phi(y), Phi the normal distribution, and its density. The lower tail is exp(-t^2 / 2) P(w), w = 1 / (1 + t / 4), with a relative error of P
// of 2e-8 for t up to 14, where the tail is below the smallest float.
struct Normal {
  F below, density;
};
CVMK_INLINE Normal normal(F y) {
  const F t = simd::abs(y);
  const F w = 1.0f / (1.0f + 0.25f * t);
  F p = simd::set(0.033946896459581606f);
  p = p * w - 0.1961782096582793f;
  p = p * w + 0.3950033856818909f;
  p = p * w - 0.33347168059206755f;
  p = p * w + 0.304488757208436f;
  p = p * w - 0.0203849914126591f;
  p = p * w + 0.12156823875862423f;
  p = p * w + 0.09482019174012975f;
  p = p * w + 0.10022900503057311f;
  p = p * w - 2.1600410307569676e-5f;
  const F bell = simd::exp(-0.5f * t * t), tail = p * bell;
  return {y < 0.0f ? tail : 1.0f - tail, bell * 0.3989422804014327f};
}

template <Activation kAct>
CVMK_INLINE F activate(F y) {
  if (kAct == kRelu) return y < 0.0f ? F{} : y;  // NaN stays
  if (kAct == kGelu) return y * normal(y).below;
  if (kAct == kSilu) return y * sigmoid(y);
  return y;
}

// grad * activation'(y).
template <Activation kAct>
CVMK_INLINE F derive(F grad, F y) {
  if (kAct == kGelu) {
    const Normal n = normal(y);
    return grad * (n.below + y * n.density);
  }
  if (kAct == kSilu) {
    const F s = sigmoid(y);
    return grad * (s * (1.0f + y * (1.0f - s)));
  }
  return grad;
}

CVMK_INLINE uint64_t bits_of(I mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(simd::bits<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<uint64_t>(_mm256_movemask_ps(simd::bits<__m256>(mask)));
#else
  uint64_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= (mask[i] != 0 ? uint64_t{1} : 0) << i;
  return found;
#endif
}

// The mask whose lane i is bit i.
CVMK_INLINE I mask_of(uint64_t bits) {
#if defined(__AVX512F__)
  return simd::bits<I>(_mm512_movm_epi32(static_cast<__mmask16>(bits)));
#else
  I mask{};
  for (int i = 0; i < kLanes; ++i) mask[i] = (bits >> i & 1) != 0 ? -1 : 0;
  return mask;
#endif
}

}  // namespace
}  // namespace cvmk::linear
