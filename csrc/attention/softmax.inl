// Scores to probabilities, and products to gradients of scores, row by row.
#pragma once
#include "attention/segments.inl"

namespace cvmk::attention {
namespace {

inline bool special_scores(const Params& p) { return p.softcap > 0.0f || p.bias.data != nullptr || p.scale <= 0.0f; }

// The lanes from column v on that lie in [a, b).
CVMK_INLINE I inside(int64_t v, int64_t a, int64_t b) {
  const I column = lane_index() + static_cast<int32_t>(v);
  return (column >= static_cast<int32_t>(a)) & (column < static_cast<int32_t>(b));
}

// `count` numbers of the bias from column j of its row on; the others 0.
CVMK_INLINE F load_bias(const Bias& bias, const char* row, int64_t j, int count) {
  if (bias.stride[3] == 1) return elements::load_n(row, bias.dtype, j, count);
  float x[kLanes] = {};
  for (int i = 0; i < count; ++i) x[i] = elements::load_one(row, bias.dtype, (j + i) * bias.stride[3]);
  return simd::load(x);
}

// The bias of a row's scores from column j of the segment on.
CVMK_INLINE const char* bias_row(const Params& p, const Segment& g, const Row& row, int64_t j) {
  const int64_t start = g.b * p.bias.stride[0] + row.head * p.bias.stride[1] + (g.q0 + row.i) * p.bias.stride[2] + (g.k0 + j) * p.bias.stride[3];
  return static_cast<const char*>(p.bias.data) + start * size_of(p.bias.dtype);
}

// Scores of columns [a, b) made complete: scale, soft cap, bias, times log2(e). slope (may be null) gets the derivative of the cap.
// first is the column's number in the segment.
inline void finish_scores(const Params& p, const Segment& g, const Row& row, int64_t first, int64_t a, int64_t b, float* s, float* slope) {
  const char* bias = p.bias.data == nullptr ? nullptr : bias_row(p, g, row, first);
  for (int64_t v = a / kLanes * kLanes; v < b; v += kLanes) {
    F x = simd::load(s + v);
    if (p.softcap > 0.0f) {
      const F y = tanh(x * (p.scale / p.softcap));
      if (slope != nullptr) simd::store(slope + v, 1.0f - y * y);
      x = y * (p.softcap * kLog2E);
    } else {
      x = x * (p.scale * kLog2E);
    }
    if (bias != nullptr) x += load_bias(p.bias, bias, v, static_cast<int>(least(kLanes, b - v))) * kLog2E;
    simd::store(s + v, x);
  }
}

// Two vectors of probabilities to memory, as floats or as bfloat16 numbers.
template <bool kHalf>
CVMK_INLINE void store_pair(float* s, uint16_t* half, F x, F y) {
  if (!kHalf) {
    simd::store(s, x);
    simd::store(s + kLanes, y);
    return;
  }
#if defined(__AVX512BF16__)
  const __m512i both = simd::bits<__m512i>(_mm512_cvtne2ps_pbh(simd::bits<__m512>(y), simd::bits<__m512>(x)));
  memcpy(half, &both, sizeof both);
#else
  simd::store_h(half, elements::round_bf16(x));
  simd::store_h(half + kLanes, elements::round_bf16(y));
#endif
}

// The maximum of columns [va, vb), whole pairs of vectors.
CVMK_INLINE float row_maximum(const float* s, int64_t va, int64_t vb) {
  F high[4] = {simd::set(-kInf), simd::set(-kInf), simd::set(-kInf), simd::set(-kInf)};
  int64_t v = va;
  for (; v + 4 * kLanes <= vb; v += 4 * kLanes)
    for (int i = 0; i < 4; ++i) high[i] = larger(simd::load(s + v + i * kLanes), high[i]);
  if (v < vb)
    for (int i = 0; i < 2; ++i) high[i] = larger(simd::load(s + v + i * kLanes), high[i]);
  return max_lanes(larger(larger(high[0], high[1]), larger(high[2], high[3])));
}

// Hides what lies outside [a, b) in the pairs of vectors at both ends.
CVMK_INLINE void hide_edges(float* s, int64_t va, int64_t a, int64_t b, int64_t vb) {
  const F hidden = simd::set(-kInf);
  if (a > va)
    for (int64_t v = va; v < va + 2 * kLanes; v += kLanes) simd::store(s + v, simd::select(inside(v, a, b), simd::load(s + v), hidden));
  if (b < vb)
    for (int64_t v = vb - 2 * kLanes; v < vb; v += kLanes) simd::store(s + v, simd::select(inside(v, a, b), simd::load(s + v), hidden));
}

// One row of forward: probabilities 2^(c s - top) of the columns [a, b) over the scores, zeros in the rest of [0, n), as floats or, where
// kHalf, as bfloat16 numbers at the row's beginning. Updates the running maximum and sum; returns the factor for what is summed so far.
// c is positive; n is a multiple of two vectors.
template <bool kPrecise, bool kHalf, bool kDrop>
CVMK_INLINE float softmax_row(float* s, int64_t n, int64_t a, int64_t b, float c, float* top, float* total, const uint32_t* columns, uint32_t row, uint32_t limit) {
  const int64_t va = a < b ? a / (2 * kLanes) * (2 * kLanes) : n, vb = a < b ? up(b, 2 * kLanes) : n;
  uint16_t* half = reinterpret_cast<uint16_t*>(s);
  const F factor = simd::set(c);
  float now = *top;
  const float old = now;
  F sum0{}, sum1{};
  if (a < b) {
    hide_edges(s, va, a, b, vb);
    const float fresh = row_maximum(s, va, vb) * c;
    now = fresh > old ? fresh : old;
  }
  const float base = now == -kInf ? 0.0f : now;
  const F shift = simd::set(base);
  for (int64_t v = va; v < vb; v += 2 * kLanes) {
    F x = exp2<kPrecise>(simd::load(s + v) * factor - shift);
    F y = exp2<kPrecise>(simd::load(s + v + kLanes) * factor - shift);
    sum0 += x;
    sum1 += y;
    if (kDrop) {
      x = simd::select(kept(columns + v, row, limit), x, F{});
      y = simd::select(kept(columns + v + kLanes, row, limit), y, F{});
    }
    store_pair<kHalf>(s + v, half + v, x, y);
  }
  for (int64_t v = 0; v < va; v += 2 * kLanes) store_pair<kHalf>(s + v, half + v, F{}, F{});
  for (int64_t v = vb; v < n; v += 2 * kLanes) store_pair<kHalf>(s + v, half + v, F{}, F{});
  if (old == now) {
    *total += sum_lanes(sum0 + sum1);
    return 1.0f;
  }
  float change[kLanes];
  simd::store(change, exp2<kPrecise>(simd::set(old - base)));
  *total = *total * change[0] + sum_lanes(sum0 + sum1);
  *top = now;
  return change[0];
}

// What a row of the backward pass needs, all relative to the block's first column.
struct GradRow {
  int64_t a, b;   // visible columns
  float lse, delta;  // log-sum-exp times log2(e); <dO, O> less the gradient of lse
  float low;         // what rounding took from lse
  uint32_t hash;
  const float* target;  // of a distillation: the teacher's map in the block, and the weight of the row's divergence
  float weight;
};

// Probabilities and gradients of scores of one vector of columns. slope: of the soft cap, or null.
template <bool kPrecise, bool kSpecial>
CVMK_INLINE void grad_vector(const Params& p, const GradRow& row, int64_t v, F s, F dp, F factor, const float* slope, const uint32_t* columns, F* prob, F* ds) {
  F x = s * factor - row.lse;
  x = exp2<kPrecise>(kPrecise ? x - row.low : x);
  if (v < row.a || v + kLanes > row.b) x = simd::select(inside(v, row.a, row.b), x, F{});
  F weighted = x;
  if (kSpecial && p.dropout_limit != 0) {
    const I keep = kept(columns + v, row.hash, p.dropout_limit);
    weighted = simd::select(keep, x, F{});
    dp = simd::select(keep, dp * p.keep_factor, F{});
  }
  F g = x * (dp - row.delta);
  if (kSpecial && row.target != nullptr) g += (x - simd::load(row.target + v)) * row.weight;
  if (kSpecial && slope != nullptr) g *= simd::load(slope + v);
  if (v < row.a || v + kLanes > row.b) g = simd::select(inside(v, row.a, row.b), g, F{});
  *prob = weighted;
  *ds = g;
}

}  // namespace
}  // namespace cvmk::attention
