// Inference: rows of floats in place. A row stays in the first cache between its passes: sum and mean, deviations, result.
#pragma once
#include "norm/params.h"
#include "norm/rows.inl"

namespace cvmk::norm {
namespace {

inline void residual_row(const Residual& p, int64_t row) {
  float* x = p.x + row * p.n;
  if (p.branch != nullptr) {
    const float* branch = p.branch + row * p.n;
    int64_t i = 0;
    for (; i + kLanes <= p.n; i += kLanes) simd::store(x + i, simd::load(x + i) + simd::load(branch + i));
    for (; i < p.n; ++i) x[i] += branch[i];
  }
  const Statistics s = statistics(x, p.n, p.rms, p.epsilon);
  float* out = p.out + row * p.n;
  int64_t i = 0;
  for (; i + kLanes <= p.n; i += kLanes) {
    F y = (simd::load(x + i) - s.mean) * s.factor * simd::load(p.weight + i);
    if (p.bias != nullptr) y += simd::load(p.bias + i);
    simd::store(out + i, y);
  }
  if (i == p.n) return;
  const int left = static_cast<int>(p.n - i);
  F y = (simd::load_n(x + i, left) - s.mean) * s.factor * simd::load_n(p.weight + i, left);
  if (p.bias != nullptr) y += simd::load_n(p.bias + i, left);
  simd::store_n(out + i, y, left);
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
