// Two passes over a piece that is in the first cache: its maximum; then the exponentials, and those logits that beat the least of the kept.
#pragma once
#include "common/simd.h"
#include "vocabulary/params.h"

namespace cvmk::vocabulary {
namespace {

using simd::F;
using simd::I;
using simd::kLanes;

constexpr int64_t kMaxima = 4 * kLanes;  // of a piece: each is another number's

// The largest number, and the largest of each of kMaxima parts, -inf where a part is empty.
CVMK_INLINE float piece_maximum(const float* x, int64_t n, float* maxima) {
  F high[4];
  for (int j = 0; j < 4; ++j) high[j] = simd::set(-__builtin_inff());
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) {
      const F v = simd::load(x + i + j * kLanes);
      high[j] = v > high[j] ? v : high[j];  // NaN is passed by; it comes back in the sum
    }
  for (int j = 0; j < 4; ++j) simd::store(maxima + j * kLanes, high[j]);
  for (int64_t at = 0; i < n; ++i, ++at) maxima[at] = x[i] > maxima[at] ? x[i] : maxima[at];
  for (int j = 0; j < 4; ++j) high[j] = simd::load(maxima + j * kLanes);
  const F a = high[0] > high[1] ? high[0] : high[1], b = high[2] > high[3] ? high[2] : high[3];
  return simd::max_lanes(a > b ? a : b);
}

// The k-th largest of the maxima: no fewer than k numbers are at least that.
inline float bound_of(const float* maxima, int64_t k) {
  if (k > kMaxima / 2) return -__builtin_inff();
  float best[kMaxima / 2];
  int64_t count = 0;
  for (int64_t i = 0; i < kMaxima; ++i) {
    if (count == k && !(maxima[i] > best[k - 1])) continue;
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0 && best[at - 1] < maxima[i]; --at) best[at] = best[at - 1];
    best[at] = maxima[i];
  }
  return best[k - 1];
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

// Whether entry a of a row goes before b leaves: the lesser, of equal ones the later id.
CVMK_INLINE bool leaves_first(const Row& row, int64_t a, int64_t b) { return row.values[a] < row.values[b] || (row.values[a] == row.values[b] && row.ids[a] > row.ids[b]); }

CVMK_INLINE void swap_entries(Row& row, int64_t a, int64_t b) {
  const float value = row.values[a];
  const int32_t id = row.ids[a];
  row.values[a] = row.values[b];
  row.ids[a] = row.ids[b];
  row.values[b] = value;
  row.ids[b] = id;
}

// A heap whose first entry leaves first.
inline void keep_in_heap(Row& row, float value, int32_t id) {
  int64_t at = row.count < row.k ? row.count++ : 0;
  row.values[at] = value;
  row.ids[at] = id;
  for (; at > 0 && leaves_first(row, at, (at - 1) / 2); at = (at - 1) / 2) swap_entries(row, at, (at - 1) / 2);
  for (;;) {
    int64_t first = at;
    for (int64_t child = 2 * at + 1; child <= 2 * at + 2 && child < row.count; ++child)
      if (leaves_first(row, child, first)) first = child;
    if (first == at) return;
    swap_entries(row, at, first);
    at = first;
  }
}

// A candidate into its place; equal values stay in the order in which they come, which is that of the ids.
CVMK_INLINE void keep(Row& row, float value, int32_t id) {
  if (row.k > kSorted) return keep_in_heap(row, value, id);
  int64_t at = row.count < row.k ? row.count++ : row.k - 1;
  for (; at > 0 && row.values[at - 1] < value; --at) {
    row.values[at] = row.values[at - 1];
    row.ids[at] = row.ids[at - 1];
  }
  row.values[at] = value;
  row.ids[at] = id;
}

// The least of the kept, where these are all that are wanted.
CVMK_INLINE float least_kept(const Row& row) { return row.values[row.k > kSorted ? 0 : row.k - 1]; }

// Which of the kLanes numbers at x are above `least` (or at it, where kAt).
template <bool kAt>
CVMK_INLINE uint32_t above(const float* x, float least) {
  const F v = simd::load(x);
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(simd::bits<__m512>(v), _mm512_set1_ps(least), kAt ? _CMP_GE_OQ : _CMP_GT_OQ);
#elif defined(__AVX2__)
  const I mask = kAt ? v >= least : v > least;
  return static_cast<uint32_t>(_mm256_movemask_ps(simd::bits<__m256>(mask)));
#else
  const I mask = kAt ? v >= least : v > least;
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i] != 0 ? 1u << i : 0u;
  return found;
#endif
}

// The numbers [from, to) of a piece among the kept; below `bound` none can be.
inline void candidates(const Piece& p, Row& row, const float* x, int64_t from, int64_t to, float bound) {
  const auto offer = [&](int64_t i) {
    if (x[i] > -__builtin_inff() && (row.count < row.k ? x[i] >= bound : x[i] > least_kept(row))) keep(row, x[i], static_cast<int32_t>(p.first + i));
  };
  int64_t i = from;
  for (; i + kLanes <= to; i += kLanes)
    for (uint32_t hits = row.count < row.k ? above<true>(x + i, bound) : above<false>(x + i, least_kept(row)); hits != 0; hits &= hits - 1) offer(i + __builtin_ctz(hits));
  for (; i < to; ++i) offer(i);
}

void top_k_row(const Piece& p, int64_t r) {
  Row& row = p.state[r];
  const float* x = p.logits + r * p.stride;
  float maxima[kMaxima];
  const float highest = piece_maximum(x, p.n, maxima);
  const float maximum = highest > row.maximum ? highest : row.maximum;
  const float shift = maximum > -__builtin_inff() && maximum < __builtin_inff() ? maximum : 0.0f;
  if (row.sum != 0.0 && row.maximum != maximum) row.sum *= __builtin_exp(static_cast<double>(row.maximum) - static_cast<double>(shift));
  row.maximum = maximum;
  row.sum += sum_of_exponentials(x, p.n, shift);
  if (row.k == 0 || (row.count == row.k && !(highest > least_kept(row)))) return;
  const bool all = p.forbidden == nullptr || p.offsets[r] == p.offsets[r + 1];
  const float bound = all && row.count < row.k ? bound_of(maxima, row.k) : -__builtin_inff();
  int64_t at = 0;
  for (int64_t f = p.forbidden == nullptr ? 0 : p.offsets[r], end = p.forbidden == nullptr ? 0 : p.offsets[r + 1]; f < end; ++f) {
    const int64_t hole = p.forbidden[f] - p.first;
    if (hole < at) continue;
    if (hole >= p.n) break;
    candidates(p, row, x, at, hole, bound);
    at = hole + 1;
  }
  candidates(p, row, x, at, p.n, bound);
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
