// Sums over a row of floats, its mean and its deviation.
#pragma once
#include "common/simd.h"
#include "common/sizes.h"

namespace cvmk::norm {
namespace {

using simd::F;
using simd::kLanes;

// fold(sum, vector) over a row: four sums side by side, added pairwise, then lane by lane.
template <typename Step>
CVMK_INLINE float fold(const float* x, int64_t n, const Step& step) {
  F sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] += step(simd::load(x + i + j * kLanes));
  for (; i + kLanes <= n; i += kLanes) sum[0] += step(simd::load(x + i));
  float rest = 0.0f;
  for (; i < n; ++i) rest += step(simd::set(x[i]))[0];
  return simd::sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

// The row less `mean` (0 for rms) times `factor` has a mean square of 1, but for epsilon.
struct Statistics {
  float mean, factor;
};

CVMK_INLINE Statistics statistics(const float* x, int64_t n, bool rms, float epsilon) {
  const float count = static_cast<float>(n);
  const float mean = rms ? 0.0f : fold(x, n, [](F v) { return v; }) / count;
  const float variance = fold(x, n, [mean](F v) { return (v - mean) * (v - mean); }) / count;
  return {mean, 1.0f / __builtin_sqrtf(variance + epsilon)};
}

}  // namespace
}  // namespace cvmk::norm
