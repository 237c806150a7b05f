// A row stays in the first cache between its passes: sum and mean, deviations, result.
#pragma once
#include "common/simd.h"
#include "norm/params.h"

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
    for (int j = 0; j < 4; ++j) sum[j] += step(simd::load(x + i + j * kLanes));
  for (; i + kLanes <= n; i += kLanes) sum[0] += step(simd::load(x + i));
  float rest = 0.0f;
  for (; i < n; ++i) rest += step(simd::set(x[i]))[0];
  return simd::sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

inline void residual_row(const Residual& p, int64_t row) {
  float* x = p.x + row * p.n;
  if (p.branch != nullptr) {
    const float* branch = p.branch + row * p.n;
    int64_t i = 0;
    for (; i + kLanes <= p.n; i += kLanes) simd::store(x + i, simd::load(x + i) + simd::load(branch + i));
    for (; i < p.n; ++i) x[i] += branch[i];
  }
  const float count = static_cast<float>(p.n);
  const float mean = p.rms ? 0.0f : fold(x, p.n, [](F v) { return v; }) / count;
  const float variance = fold(x, p.n, [mean](F v) { return (v - mean) * (v - mean); }) / count;
  const float factor = 1.0f / __builtin_sqrtf(variance + p.epsilon);
  float* out = p.out + row * p.n;
  for (int64_t i = 0; i < p.n; i += kLanes) {
    const int left = static_cast<int>(least(kLanes, p.n - i));
    F y = (simd::load_n(x + i, left) - mean) * factor * simd::load_n(p.weight + i, left);
    if (p.bias != nullptr) y += simd::load_n(p.bias + i, left);
    simd::store_n(out + i, y, left);
  }
}

int64_t residual_scratch(const Residual&, const Team&) { return 0; }

void run_residual(const Residual& p, char*, const Team& team) {
  if (p.rows * p.n < 1 << 14) {
    for (int64_t row = 0; row < p.rows; ++row) residual_row(p, row);
    return;
  }
  team.share(team.size, p.rows, [&](int64_t first, int64_t last, int) {
    for (int64_t row = first; row < last; ++row) residual_row(p, row);
  });
}

}  // namespace
}  // namespace cvmk::norm
