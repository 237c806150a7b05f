// A row is one channel of one sequence. Its inputs p are read once, as floats, to a buffer in the first cache; lanes are steps, and a tap is a load
// one step further on.
#pragma once
#include "common/activations.h"
#include "common/lanes.h"
#include "conv/params.h"

namespace cvmk::conv {
namespace {

constexpr int64_t kFewElements = 1 << 14;  // below, other threads are not worth waking

// How many inputs of a row of sequence b are real.
CVMK_INLINE int64_t real_inputs(const Shape& s, int64_t b) {
  if (s.lengths == nullptr) return s.length;
  const int64_t read = integer_at(s.lengths, s.lengths_dtype, b);
  return read < 0 ? 0 : least(read, s.length);
}

// Floats of a buffer that holds a row with width - 1 numbers before and after it, read by whole vectors at any tap.
CVMK_INLINE int64_t buffer_size(const Shape& s) { return up(up(s.length, kLanes) + 2 * (s.width - 1) + kLanes, 16); }

CVMK_INLINE void clear(float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0.0f;
}

// p of row `row` to `to` [buffer_size], zeros behind the `real` inputs.
template <Dtype kX>
inline void read_row(const Shape& s, const Elements& x, int64_t row, int64_t real, float* to) {
  const int64_t front = s.width - 1;
  for (int64_t k = 0; k < front; ++k) to[k] = s.before == nullptr ? 0.0f : s.before[row * front + k];
  float* const inputs = to + front;
  each_vector(real, [&](int64_t i, auto lanes) { simd::store(inputs + i, get<kX>(x, row * s.length + i, lanes)); });
  clear(inputs + real, up(real, kLanes) - real + front + kLanes);  // as far as any tap of a vector reads
}

// bias + sum_k weight_k p_{t+k} for the steps t, t + 1, ... of a vector. kWidth is the width, or 0 where it is known at run time only.
template <int kWidth>
CVMK_INLINE F filtered(const Shape& s, const float* weight, float bias, const float* p, int64_t t) {
  F v = simd::set(bias);
  const int64_t width = kWidth > 0 ? kWidth : s.width;
  for (int64_t k = 0; k < width; ++k) v += simd::set(weight[k]) * simd::load(p + t + k);
  return v;
}

CVMK_INLINE float bias_of(const float* bias, int64_t channel) { return bias == nullptr ? 0.0f : bias[channel]; }

CVMK_INLINE int64_t threads_for(int64_t items, int64_t elements, const Team& team) { return elements < kFewElements ? 1 : most(1, least(items, team.size)); }

}  // namespace
}  // namespace cvmk::conv
