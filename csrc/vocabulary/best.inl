// A part of kPartColumns logits of a row is a few vectors, which stay in registers: each lane keeps its own maximum and sum.
#pragma once
#include "common/elements.h"
#include "common/simd.h"
#include "vocabulary/params.h"

namespace cvmk::vocabulary {
namespace {

using simd::F;
using simd::I;
using simd::kLanes;

constexpr int kVectors = gemm::kPartColumns / kLanes;

CVMK_INLINE F infinity() { return simd::set(__builtin_inff()); }

CVMK_INLINE I lanes_from(int32_t first) {
  I lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes + first;
}

// Which lanes of a are above b's.
CVMK_INLINE uint32_t above(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(simd::bits<__m512>(a), simd::bits<__m512>(b), _CMP_GT_OQ);
#elif defined(__AVX2__)
  const I mask = a > b;
  return static_cast<uint32_t>(_mm256_movemask_ps(simd::bits<__m256>(mask)));
#else
  const I mask = a > b;
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i] != 0 ? 1u << i : 0u;
  return found;
#endif
}

// -- the k largest ------------------------------------------------------------------------------------------------------------------
// Whether entry a goes before b leaves: the lesser, of equal ones the later id.
CVMK_INLINE bool leaves_first(const Best& kept, int64_t a, int64_t b) { return kept.values[a] < kept.values[b] || (kept.values[a] == kept.values[b] && kept.ids[a] > kept.ids[b]); }

CVMK_INLINE void swap_entries(Best& kept, int64_t a, int64_t b) {
  const float value = kept.values[a];
  const int32_t id = kept.ids[a];
  kept.values[a] = kept.values[b];
  kept.ids[a] = kept.ids[b];
  kept.values[b] = value;
  kept.ids[b] = id;
}

// A heap whose first entry leaves first.
inline void keep_in_heap(Best& kept, int64_t k, float value, int32_t id) {
  int64_t at = kept.count < k ? kept.count++ : 0;
  kept.values[at] = value;
  kept.ids[at] = id;
  for (; at > 0 && leaves_first(kept, at, (at - 1) / 2); at = (at - 1) / 2) swap_entries(kept, at, (at - 1) / 2);
  for (;;) {
    int64_t first = at;
    for (int64_t child = 2 * at + 1; child <= 2 * at + 2 && child < kept.count; ++child)
      if (leaves_first(kept, child, first)) first = child;
    if (first == at) return;
    swap_entries(kept, at, first);
    at = first;
  }
}

// The least of the kept where there are k of them: what is not above it is passed by.
CVMK_INLINE float bar(const Best& kept, int64_t k) { return kept.count < k ? -__builtin_inff() : kept.values[k > kSorted ? 0 : k - 1]; }

// A candidate above the bar into its place. They come by rising ids, so equal ones stay in the order of theirs.
CVMK_INLINE void keep(Best& kept, int64_t k, float value, int32_t id) {
  if (k > kSorted) return keep_in_heap(kept, k, value, id);
  int64_t at = kept.count < k ? kept.count++ : k - 1;
  for (; at > 0 && kept.values[at - 1] < value; --at) {
    kept.values[at] = kept.values[at - 1];
    kept.ids[at] = kept.ids[at - 1];
  }
  kept.values[at] = value;
  kept.ids[at] = id;
}

// Candidates among logits, whose lanes' largest are `highest`.
CVMK_INLINE void offer(Best& kept, int64_t k, const F* logits, F highest, int32_t first) {
  if (above(highest, simd::set(bar(kept, k))) == 0) return;
  for (int v = 0; v < kVectors; ++v) {
    uint32_t hits = above(logits[v], simd::set(bar(kept, k)));
    if (hits == 0) continue;
    float values[kLanes];
    simd::store(values, logits[v]);
    for (; hits != 0; hits &= hits - 1)
      if (const int i = __builtin_ctz(hits); values[i] > bar(kept, k)) keep(kept, k, values[i], first + v * kLanes + i);
  }
}

CVMK_INLINE F highest_of(const F* logits) {
  F high[2] = {logits[0], logits[1]};
#pragma GCC unroll 16
  for (int v = 2; v < kVectors; ++v) high[v % 2] = simd::max(logits[v], high[v % 2]);  // NaN is passed by but for the first two; it comes back in the sum
  return simd::max(high[0], high[1]);
}

// -- the sum ------------------------------------------------------------------------------------------------------------------------
constexpr float kRoom = 60.0f;  // exp(kRoom) times a segment is far from overflowing, and what is lost below the shift is far below one rounding of the sum

// The number itself where it is finite. A lane of -inf alone gets the lowest finite one, so that it does not hold the lanes beside it, or what is still to come,
// at a shift under which they vanish.
CVMK_INLINE F shift_of(F highest) { return simd::select(highest < infinity(), simd::max(highest, simd::set(-__FLT_MAX__)), F{}); }

// Online softmax (Milakov & Gimelshein 2018), every lane for itself: its sum is of exp(logit - shift), where the shift moves only when a logit is far above it.
CVMK_INLINE void add_up(Lanes& lanes, const F* logits, F highest, bool begins) {
  F shift = begins ? shift_of(highest) : simd::load(lanes.shift), sum = begins ? F{} : simd::load(lanes.sum), more[2] = {};
  if (begins) {
    simd::store(lanes.shift, shift);
  } else if (above(highest, shift + kRoom) != 0) {
    const F next = shift_of(simd::max(highest, shift));
    sum *= simd::falling_exp(shift - next);
    shift = next;
    simd::store(lanes.shift, shift);
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) more[v % 2] += simd::falling_exp(logits[v] - shift);
  simd::store(lanes.sum, sum + (more[0] + more[1]));
}

inline void close_segment(const Lanes& lanes, float& shift, float& sum) {
  const F own = simd::load(lanes.shift);
  shift = simd::max_lanes(own);
  sum = simd::sum_lanes(simd::load(lanes.sum) * simd::falling_exp(own - shift));
}

// -- exceptions ---------------------------------------------------------------------------------------------------------------------
// The first of rising ids that is not below `id`.
CVMK_INLINE int64_t place_of(const int32_t* ids, int64_t count, int64_t id) {
  int64_t low = 0;
  for (int64_t high = count; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (ids[middle] < id) low = middle + 1;
    else high = middle;
  }
  return low;
}
CVMK_INLINE bool any_within(const int32_t* ids, int64_t count, int64_t first, int64_t end) {
  if (count == 0) return false;
  const int64_t at = place_of(ids, count, first);
  return at < count && ids[at] < end;
}

CVMK_INLINE bool special(const Row& row, int64_t first, int64_t end) {
  return row.logits != nullptr || (row.wanted >= first && row.wanted < end) || any_within(row.said, row.said_count, first, end) ||
         any_within(row.forbidden, row.forbidden_count, first, end);
}

// Logits [first, end) of a row for which something is special: changed in place; `choice` is what may be chosen.
inline __attribute__((noinline)) void exceptions(const Part& p, int64_t r, int64_t first, int64_t end, F* logits, F* choice) {
  const Row& row = p.rows[r];
  float values[gemm::kPartColumns];
  for (int v = 0; v < kVectors; ++v) simd::store(values + v * kLanes, logits[v]);
  for (int64_t id = first; id < p.never && id < end; ++id) values[id - first] = -__builtin_inff();
  for (int64_t s = place_of(row.said, row.said_count, first); s < row.said_count && row.said[s] < end; ++s) {
    float& logit = values[row.said[s] - first];
    logit = logit > 0.0f ? logit / row.penalty : logit * row.penalty;
  }
  if (row.logits != nullptr) memcpy(row.logits + first, values, static_cast<size_t>(end - first) * sizeof(float));
  if (row.wanted >= first && row.wanted < end) p.wanted[r] = values[row.wanted - first];
  for (int v = 0; v < kVectors; ++v) logits[v] = simd::load(values + v * kLanes);
  for (int64_t f = place_of(row.forbidden, row.forbidden_count, first); f < row.forbidden_count && row.forbidden[f] < end; ++f) values[row.forbidden[f] - first] = -__builtin_inff();
  for (int v = 0; v < kVectors; ++v) choice[v] = simd::load(values + v * kLanes);
}

// -- a part -------------------------------------------------------------------------------------------------------------------------
CVMK_INLINE F sums_of(const int32_t* p) {
  I v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, F);
}
CVMK_INLINE F sums_of(const float* p) { return simd::load(p); }

template <typename Sum, bool kBias>
inline void take_rows(const Part& p, const gemm::Part& g) {
  constexpr bool kScaled = static_cast<Sum>(0.5f) == 0;
  const gemm::Linear& l = *g.linear;
  const int64_t first = p.first + g.column, end = first + g.columns, from = g.column % kSegment;
  const bool begins = from == 0, ends = from + g.columns == kSegment || g.column + g.columns == p.n;
  F scales[kVectors], bias[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int left = static_cast<int>(most(0, least(kLanes, g.columns - v * kLanes)));
    scales[v] = kScaled ? simd::load_n(l.scales + g.column + v * kLanes, left) : F{};
    bias[v] = kBias ? elements::load_n(l.bias, l.bias_dtype, g.column + v * kLanes, left) : F{};
  }
  for (int64_t i = 0; i < g.rows; ++i) {
    const int64_t r = g.row + i;
    const Row& row = p.rows[r];
    const Sum* sums = static_cast<const Sum*>(g.sums) + i * g.stride;
    F logits[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      logits[v] = sums_of(sums + v * kLanes);
      if (kScaled) logits[v] = logits[v] * g.row_scales[i] * scales[v];
      if (kBias) logits[v] += bias[v];
    }
    if (g.columns < gemm::kPartColumns)
      for (int v = 0; v < kVectors; ++v) logits[v] = simd::select(lanes_from(v * kLanes) < static_cast<int32_t>(g.columns), logits[v], -infinity());
    F highest;
    if (first < p.never || (!row.plain && special(row, first, end))) {
      F choice[kVectors];
      exceptions(p, r, first, end, logits, choice);
      highest = highest_of(logits);
      if (row.k > 0) offer(p.best[r], row.k, choice, highest, static_cast<int32_t>(first));
    } else {
      highest = highest_of(logits);
      if (row.k > 0) offer(p.best[r], row.k, logits, highest, static_cast<int32_t>(first));
    }
    if (!row.sum) continue;
    add_up(p.lanes[r], logits, highest, begins);
    const int64_t at = r * p.segments + first / kSegment;
    if (ends) close_segment(p.lanes[r], p.shifts[at], p.sums[at]);
  }
}

void take(void* part, const gemm::Part& products) {
  const Part& p = *static_cast<const Part*>(part);
  const bool bias = products.linear->bias != nullptr;
  if (products.row_scales != nullptr) bias ? take_rows<int32_t, true>(p, products) : take_rows<int32_t, false>(p, products);
  else bias ? take_rows<float, true>(p, products) : take_rows<float, false>(p, products);
}

void merge(const Row& row, const Part* parts, int64_t count, int64_t r) {
  Best& all = parts[0].best[r];
  for (int64_t part = 1; part < count; ++part) {
    const Best& other = parts[part].best[r];
    for (int64_t i = 0; i < other.count; ++i) {
      const float value = other.values[i], least = bar(all, row.k);
      // A heap's entries come in any order, so the later of equal ones may be there already.
      if (value > least || (row.k > kSorted && value == least && other.ids[i] < all.ids[0])) keep(all, row.k, value, other.ids[i]);
    }
  }
}

double normaliser(const float* shifts, const float* sums, int64_t segments) {
  float shift = shifts[0];
  for (int64_t s = 1; s < segments; ++s) shift = shifts[s] > shift ? shifts[s] : shift;
  double total = 0.0;
  for (int64_t s = 0; s < segments; s += kLanes) {
    const int left = static_cast<int>(least(kLanes, segments - s));
    float lanes[kLanes];
    simd::store(lanes, simd::load_n(sums + s, left) * simd::falling_exp(simd::load_n(shifts + s, left) - shift));
    for (int i = 0; i < left; ++i) total += static_cast<double>(lanes[i]);
  }
  return static_cast<double>(shift) + __builtin_log(total);
}

}  // namespace
}  // namespace cvmk::vocabulary
