// Two passes over a piece that is in the first cache: its maximum; then the exponentials, and those logits that beat the least of the kept.
#pragma once
#include "common/simd.h"
#include "vocabulary/params.h"

namespace cvmk::vocabulary {
namespace {

using simd::F;
using simd::I;
using simd::kLanes;

CVMK_INLINE float piece_maximum(const float* x, int64_t n) {
  F high[4];
  for (int j = 0; j < 4; ++j) high[j] = simd::set(-__builtin_inff());
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) {
      const F v = simd::load(x + i + j * kLanes);
      high[j] = v > high[j] ? v : high[j];  // NaN is passed by; it comes back in the sum
    }
  float found = -__builtin_inff();
  for (int j = 0; j < 4; ++j) {
    const float one = simd::max_lanes(high[j]);
    found = one > found ? one : found;
  }
  for (; i < n; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

CVMK_INLINE double sum_of_exponentials(const float* x, int64_t n, float shift) {
  F sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int j = 0; j < 2; ++j) sum[j] += simd::falling_exp(simd::load(x + i + j * kLanes) - shift);
  for (; i < n; i += kLanes) {
    const int left = static_cast<int>(least(kLanes, n - i));
    sum[0] += simd::first_lanes(simd::falling_exp(simd::load_n(x + i, left) - shift), left);
  }
  return static_cast<double>(simd::sum_lanes(sum[0] + sum[1]));
}

// A candidate into its place; equal values stay in the order in which they come, which is that of the ids.
CVMK_INLINE void keep(Row& row, int64_t k, float value, int32_t id) {
  int64_t at = row.count < k ? row.count++ : k - 1;
  for (; at > 0 && row.values[at - 1] < value; --at) {
    row.values[at] = row.values[at - 1];
    row.ids[at] = row.ids[at - 1];
  }
  row.values[at] = value;
  row.ids[at] = id;
}

CVMK_INLINE bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(simd::bits<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(simd::bits<__m256i>(mask)) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

inline void candidates(const Piece& p, Row& row, const float* x, int64_t from, int64_t to) {
  const auto offer = [&](int64_t i) {
    if (x[i] > -__builtin_inff() && (row.count < p.k || x[i] > row.values[p.k - 1])) keep(row, p.k, x[i], static_cast<int32_t>(p.first + i));
  };
  int64_t i = from;
  for (; i < to && row.count < p.k; ++i) offer(i);
  for (; i + 2 * kLanes <= to; i += 2 * kLanes) {
    const float least_kept = row.values[p.k - 1];
    const I better = (simd::load(x + i) > least_kept) | (simd::load(x + i + kLanes) > least_kept);
    if (any(better))
      for (int j = 0; j < 2 * kLanes; ++j) offer(i + j);
  }
  for (; i < to; ++i) offer(i);
}

void top_k_row(const Piece& p, int64_t r) {
  Row& row = p.state[r];
  const float* x = p.logits + r * p.stride;
  const float highest = piece_maximum(x, p.n);
  const float maximum = highest > row.maximum ? highest : row.maximum;
  const float shift = maximum > -__builtin_inff() && maximum < __builtin_inff() ? maximum : 0.0f;
  if (row.sum != 0.0 && row.maximum != maximum) row.sum *= __builtin_exp(static_cast<double>(row.maximum) - static_cast<double>(shift));
  row.maximum = maximum;
  row.sum += sum_of_exponentials(x, p.n, shift);
  if (row.count == p.k && !(highest > row.values[p.k - 1])) return;
  int64_t at = 0;
  for (int64_t f = p.forbidden == nullptr ? 0 : p.offsets[r], end = p.forbidden == nullptr ? 0 : p.offsets[r + 1]; f < end; ++f) {
    const int64_t hole = p.forbidden[f] - p.first;
    if (hole < at) continue;
    if (hole >= p.n) break;
    candidates(p, row, x, at, hole);
    at = hole + 1;
  }
  candidates(p, row, x, at, p.n);
}

int64_t top_k_scratch(const Piece&, const Team&) { return 0; }

void run_top_k(const Piece& p, char*, const Team& team) {
  if (p.rows < 2 * team.size) {
    for (int64_t r = 0; r < p.rows; ++r) top_k_row(p, r);
    return;
  }
  team.share(team.size, p.rows, [&](int64_t first, int64_t last, int) {
    for (int64_t r = first; r < last; ++r) top_k_row(p, r);
  });
}

}  // namespace
}  // namespace cvmk::vocabulary
