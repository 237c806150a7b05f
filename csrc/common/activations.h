// Activations on vectors, and what their derivatives are made of.
#pragma once

#include "common/simd.h"

namespace {
namespace activations {

using simd::F;

CVMK_INLINE F sigmoid(F y) { return 1.0f / (1.0f + simd::exp(-y)); }
CVMK_INLINE F silu(F y) { return y / (1.0f + simd::exp(-y)); }

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

CVMK_INLINE F relu(F y) { return y < 0.0f ? F{} : y; }  // NaN stays
CVMK_INLINE F gelu(F y) { return y * normal(y).below; }

}  // namespace activations
}  // namespace
