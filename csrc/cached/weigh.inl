// Scores to weights, in place: what attention over caches of any type shares.
#pragma once
#include "cached/params.h"
#include "common/simd.h"

namespace cvmk::cached {
namespace {

using simd::F;
using simd::I;
using simd::kLanes;

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

constexpr int64_t kRows = 24;     // of a block
constexpr int64_t kGrain = 1 << 15;  // multiplications below which the calling thread does the work

CVMK_INLINE int64_t score_width(int64_t longest) { return up(longest, kColumns); }

// The lanes before the n-th.
CVMK_INLINE I before(int64_t n) {
  I lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes < static_cast<int32_t>(n);
}

// Scores to weights that sum to the result, whose inverse is returned; zeros up to a whole vector.
inline float weigh_row(float* s, int64_t length, float scale) {
  F high = simd::set(-__builtin_inff());
  int64_t i = 0;
  for (; i < length; i += kLanes) {
    F v = simd::load(s + i);
    if (length - i < kLanes) v = simd::select(before(length - i), v, high);
    high = v > high ? v : high;
  }
  const float maximum = simd::max_lanes(high);
  F sum{};
  for (i = 0; i < length; i += kLanes) {
    F v = simd::falling_exp((simd::load(s + i) - maximum) * scale);
    if (length - i < kLanes) v = simd::first_lanes(v, static_cast<int>(length - i));
    sum += v;
    simd::store(s + i, v);
  }
  return 1.0f / simd::sum_lanes(sum);
}

// The same of scores in registers, as many vectors as `length` has.
template <int kVectors>
CVMK_INLINE float weigh(F (&s)[kVectors], int64_t length, float scale) {
  F high = simd::set(-__builtin_inff());
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const F x = v + 1 == kVectors ? simd::select(before(length - v * kLanes), s[v], high) : s[v];
    high = x > high ? x : high;
  }
  const float maximum = simd::max_lanes(high);
  F sum{};
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    s[v] = simd::falling_exp((s[v] - maximum) * scale);
    if (v + 1 == kVectors) s[v] = simd::first_lanes(s[v], static_cast<int>(length - v * kLanes));
    sum += s[v];
  }
  return 1.0f / simd::sum_lanes(sum);
}

}  // namespace
}  // namespace cvmk::cached
