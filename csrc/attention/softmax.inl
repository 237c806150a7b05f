// Scores to probabilities, and products to gradients of scores, row by row.
#pragma once
#include "attention/plan.inl"

namespace {

inline bool special_scores(const Params& p) { return p.softcap > 0.0f || p.bias.data != nullptr || p.scale <= 0.0f; }

// The lanes from column v on that lie in [a, b).
CVMK_INLINE I inside(int64_t v, int64_t a, int64_t b) {
  const I column = lane_index() + static_cast<int32_t>(v);
  return (column >= static_cast<int32_t>(a)) & (column < static_cast<int32_t>(b));
}

// `count` numbers of the bias from column j of its row on; the others 0.
CVMK_INLINE F load_bias(const Bias& bias, const char* row, int64_t j, int count) {
  if (bias.stride[3] == 1 && bias.dtype != cvmk::attention::kFloat64) return load_any_n(row, bias.dtype, j, count);
  float x[kLanes] = {};
  for (int i = 0; i < count; ++i) {
    const char* one = row + (j + i) * bias.stride[3] * width_of(bias.dtype);
    uint16_t half;
    memcpy(&half, one, 2);
    if (bias.dtype == cvmk::attention::kFloat64) {
      double wide;
      memcpy(&wide, one, 8);
      x[i] = static_cast<float>(wide);
    } else if (bias.dtype == cvmk::attention::kFloat32) {
      memcpy(&x[i], one, 4);
    } else {
      x[i] = bias.dtype == cvmk::attention::kBFloat16 ? simd::bits<float>(static_cast<uint32_t>(half) << 16) : simd::half_to_float(half);
    }
  }
  return simd::load(x);
}

// Scores of columns [a, b) made complete: scale, soft cap, bias, times log2(e). slope (may be null) gets the derivative of the cap.
// first is the column's number in the segment.
inline void finish_scores(const Params& p, const Segment& g, const Row& row, int64_t first, int64_t a, int64_t b, float* s, float* slope) {
  const char* bias = nullptr;
  if (p.bias.data != nullptr) {
    const int64_t start = g.b * p.bias.stride[0] + row.head * p.bias.stride[1] + (g.q0 + row.i) * p.bias.stride[2] + (g.k0 + first) * p.bias.stride[3];
    bias = static_cast<const char*>(p.bias.data) + start * width_of(p.bias.dtype);
  }
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

CVMK_INLINE I kept(const uint32_t* columns, uint32_t row, uint32_t limit) {
  U c;
  memcpy(&c, columns, sizeof c);
  return simd::bits<I>(mix(c ^ row) >= limit);
}

// One row of forward: probabilities 2^(c s - top) of the columns [a, b) over the scores, zeros in the rest of [0, n), as floats or, where
// kHalf, as bfloat16 numbers at the row's beginning. Updates the running maximum and sum; returns the factor for what is summed so far.
template <bool kPrecise, bool kHalf, bool kDrop>
inline float softmax_row(float* s, int64_t n, int64_t a, int64_t b, float c, float* top, float* total, const uint32_t* columns, uint32_t row, uint32_t limit) {
  const int64_t va = a / kLanes * kLanes, vb = up(b, kLanes);
  uint16_t* half = reinterpret_cast<uint16_t*>(s);
  const F factor = simd::set(c);
  F high[2] = {simd::set(-kInf), simd::set(-kInf)};
  if (a < b) {
    if (a > va) simd::store(s + va, simd::select(inside(va, a, b), simd::load(s + va), simd::set(-kInf)));
    if (b < vb) simd::store(s + vb - kLanes, simd::select(inside(vb - kLanes, a, b), simd::load(s + vb - kLanes), simd::set(-kInf)));
    int64_t v = va;
    for (; v + 2 * kLanes <= vb; v += 2 * kLanes) {
      high[0] = simd::max(simd::load(s + v) * factor, high[0]);
      high[1] = simd::max(simd::load(s + v + kLanes) * factor, high[1]);
    }
    if (v < vb) high[0] = simd::max(simd::load(s + v) * factor, high[0]);
  }
  const float old = *top, fresh = max_lanes(simd::max(high[0], high[1]));
  const float now = fresh > old ? fresh : old;
  const float base = now == -kInf ? 0.0f : now;
  const F shift = simd::set(base);
  F sum{};
  for (int64_t v = 0; v < va; v += kLanes)
    if (!kHalf) simd::store(s + v, F{});
  for (int64_t v = a < b ? va : 0; a < b && v < vb; v += kLanes) {
    F x = exp2<kPrecise>(simd::load(s + v) * factor - shift);
    sum += x;
    if (kDrop) x = simd::select(kept(columns + v, row, limit), x, F{});
    if (kHalf)
      simd::store_h(half + v, round_bf16(x));
    else
      simd::store(s + v, x);
  }
  const int64_t rest = a < b ? vb : 0;
  if (kHalf) {
    for (int64_t v = 0; v < (a < b ? va : 0); v += kLanes) simd::store_h(half + v, H{});
    for (int64_t v = rest; v < n; v += kLanes) simd::store_h(half + v, H{});
  } else {
    for (int64_t v = rest; v < n; v += kLanes) simd::store(s + v, F{});
  }
  *top = now;
  if (old == now) {
    *total += sum_lanes(sum);
    return 1.0f;
  }
  float scaled[kLanes];
  simd::store(scaled, exp2<kPrecise>(simd::set(old == -kInf ? -kInf : old - base)));
  *total = *total * scaled[0] + sum_lanes(sum);
  return scaled[0];
}

// What a row of the backward pass needs, all relative to the block's first column.
struct GradRow {
  int64_t a, b;   // visible columns
  float lse, delta;  // log-sum-exp times log2(e); <dO, O> less the gradient of lse
  uint32_t hash;
};

// Probabilities and gradients of scores of one vector of columns. slope: of the soft cap, or null.
template <bool kPrecise, bool kSpecial>
CVMK_INLINE void grad_vector(const Params& p, const GradRow& row, int64_t v, F s, F dp, F factor, const float* slope, const uint32_t* columns, F* prob, F* ds) {
  F x = exp2<kPrecise>(s * factor - row.lse);
  if (v < row.a || v + kLanes > row.b) x = simd::select(inside(v, row.a, row.b), x, F{});
  F weighted = x;
  if (kSpecial && p.dropout_limit != 0) {
    const I keep = kept(columns + v, row.hash, p.dropout_limit);
    weighted = simd::select(keep, x, F{});
    dp = simd::select(keep, dp * p.keep_factor, F{});
  }
  F g = x * (dp - row.delta);
  if (kSpecial && slope != nullptr) g *= simd::load(slope + v);
  if (v < row.a || v + kLanes > row.b) g = simd::select(inside(v, row.a, row.b), g, F{});
  *prob = weighted;
  *ds = g;
}

}  // namespace
