// One query a head over many keys: keys and values are read once, where they are, so nothing is packed. Sums are in float32.
#pragma once
#include "attention/softmax.inl"

namespace {

constexpr int64_t kDirectRows = 16;
constexpr int64_t kAhead = 16;  // rows fetched ahead of their use; an address behind the end is no fault

// A matter of the sequence alone, so that its bits do not depend on the batch.
inline bool directly(const Params& p, const Segment& g) {
  return g.rows == 1 && g.visible >= 128 && p.heads / p.kv_heads <= kDirectRows && p.teacher.heads == 0;
}

template <int64_t kDtype>
void direct_scores(const Params& p, const Segment& g, int64_t kv_head, int64_t count, int64_t j, int64_t n, const float* q, float* s, int64_t lds) {
  const int64_t width = up(p.d, kLanes), whole = p.d / kLanes * kLanes;
  for (int64_t k = 0; k < n; ++k) {
    const char* row = row_of(p.k, width_of(kDtype), g.b, kv_head, g.k0 + j + k);
    for (int64_t i = 0; i < p.d * width_of(kDtype); i += 64) __builtin_prefetch(row + kAhead * p.k.row * width_of(kDtype) + i);
    for (int64_t r = 0; r < count; ++r) {
      F sum{};
      for (int64_t i = 0; i < whole; i += kLanes) sum += load_any(row, kDtype, i) * simd::load(q + r * width + i);
      if (whole < p.d) sum += load_any_n(row, kDtype, whole, static_cast<int>(p.d - whole)) * simd::load(q + r * width + whole);
      s[r * lds + k] = sum_lanes(sum);
    }
  }
}

// out[r] += the values [j + a, j + b) weighted by p.
template <int64_t kDtype>
void direct_values(const Params& p, const Segment& g, int64_t kv_head, int64_t j, int64_t a, int64_t b, const float* weights, float* out) {
  for (int64_t k = a; k < b; k += 4) {
    const char* rows[4];
    float w[4];
    for (int64_t i = 0; i < 4; ++i) {
      rows[i] = row_of(p.v, width_of(kDtype), g.b, kv_head, g.k0 + j + least(k + i, b - 1));
      w[i] = k + i < b ? weights[k + i] : 0.0f;
      for (int64_t c = 0; c < p.dv * width_of(kDtype); c += 64) __builtin_prefetch(rows[i] + kAhead * p.v.row * width_of(kDtype) + c);
    }
    for (int64_t i = 0; i < p.dv; i += kLanes) {
      const int count = static_cast<int>(least(kLanes, p.dv - i));
      F x[4];
      for (int m = 0; m < 4; ++m) x[m] = count == kLanes ? load_any(rows[m], kDtype, i) : load_any_n(rows[m], kDtype, i, count);
      if (k + 4 > b)
        for (int64_t m = b - k; m < 4; ++m) x[m] = F{};
      simd::store(out + i, simd::load(out + i) + ((x[0] * w[0] + x[1] * w[1]) + (x[2] * w[2] + x[3] * w[3])));
    }
  }
}

inline void direct_scores(const Params& p, const Segment& g, int64_t kv_head, int64_t count, int64_t j, int64_t n, const float* q, float* s, int64_t lds) {
  if (p.dtype == cvmk::attention::kFloat32) return direct_scores<cvmk::attention::kFloat32>(p, g, kv_head, count, j, n, q, s, lds);
  if (p.dtype == cvmk::attention::kBFloat16) return direct_scores<cvmk::attention::kBFloat16>(p, g, kv_head, count, j, n, q, s, lds);
  direct_scores<cvmk::attention::kFloat16>(p, g, kv_head, count, j, n, q, s, lds);
}

inline void direct_values(const Params& p, const Segment& g, int64_t kv_head, int64_t j, int64_t a, int64_t b, const float* weights, float* out) {
  if (p.dtype == cvmk::attention::kFloat32) return direct_values<cvmk::attention::kFloat32>(p, g, kv_head, j, a, b, weights, out);
  if (p.dtype == cvmk::attention::kBFloat16) return direct_values<cvmk::attention::kBFloat16>(p, g, kv_head, j, a, b, weights, out);
  direct_values<cvmk::attention::kFloat16>(p, g, kv_head, j, a, b, weights, out);
}

}  // namespace
