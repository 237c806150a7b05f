// Activations and their derivatives on vectors of pre-activations, and the bits that a relu leaves behind.
#pragma once
#include "common/activations.h"
#include "common/elements.h"
#include "linear/params.h"

namespace cvmk::linear {
namespace {

using simd::F;
using simd::I;
using simd::U;
using simd::kLanes;

template <Activation kAct>
CVMK_INLINE F activate(F y) {
  if (kAct == kRelu) return activations::relu(y);
  if (kAct == kGelu) return activations::gelu(y);
  if (kAct == kSilu) return activations::silu(y);
  return y;
}

// grad * activation'(y).
template <Activation kAct>
CVMK_INLINE F derive(F grad, F y) {
  if (kAct == kGelu) {
    const activations::Normal n = activations::normal(y);
    return grad * (n.below + y * n.density);
  }
  if (kAct == kSilu) {
    const F s = activations::sigmoid(y);
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
