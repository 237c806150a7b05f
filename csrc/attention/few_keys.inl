// Rows over few keys, as in a batch of sentences: one block of keys, so a row's softmax is final at once, and nothing is kept of a row but
// its maximum and sum. Sums are made in the same order as for many keys, so that both ways give the same bits.
#pragma once
#include "attention/softmax.inl"

namespace cvmk::attention {
namespace {

// A matter of the sequence alone; the rarer options take the general way.
inline bool has_few_keys(const Params& p, const Segment& g, int64_t limit) {
  return g.visible <= limit && !special_scores(p) && p.dropout_limit == 0 && p.teacher.heads == 0;
}

constexpr int64_t kFewRows = 64;

// A block of rows: where they are, the keys [lo, hi) that each sees, and its maximum (times log2(e)), sum and 1 / sum.
struct FewRows {
  int64_t count;
  bool same;  // all see the same keys
  const char* q[kFewRows];
  char* out[kFewRows];
  float* lse[kFewRows];
  int64_t lo[kFewRows], hi[kFewRows];
  float top[kFewRows], total[kFewRows], factor[kFewRows];
};

inline void few_rows(const Params& p, const Segment& g, int64_t kv_head, int64_t first, int64_t count, FewRows* s) {
  const int64_t width = size_of(p.dtype);
  int64_t head = kv_head * (p.heads / p.kv_heads) + first / g.rows, i = first % g.rows;
  s->count = count;
  s->same = p.window_left < 0 && p.window_right < 0;
  for (int64_t r = 0; r < count; ++r) {
    s->q[r] = row_of(p.q, width, g.b, head, g.q0 + i);
    s->out[r] = row_of_mutable(p.out, width, g.b, head, g.q0 + i);
    s->lse[r] = static_cast<float*>(p.lse.data) + g.b * p.lse.batch + head * p.lse.head + g.q0 + i;
    visible_keys(p, g, i, &s->lo[r], &s->hi[r]);
    if (++i == g.rows) {
      i = 0;
      ++head;
    }
  }
}

// The log-sum-exps of a block. The sums' last vector is whole.
inline void few_statistics(FewRows* s) {
  for (int64_t r = 0; r < s->count; r += kLanes) {
    float logs[kLanes];
    simd::store(logs, simd::log(simd::load(s->total + r)));
    for (int64_t i = r; i < least(r + kLanes, s->count); ++i) {
      const float total = s->total[i], top = s->top[i];
      *s->lse[i] = total == 0.0f ? -kInf : total < kInf ? top * kLn2 + logs[i - r] : total + top;
    }
  }
}

// Rows without a visible key.
inline void few_empty(const Params& p, const FewRows& s) {
  for (int64_t r = 0; r < s.count; ++r)
    if (s.total[r] == 0.0f) memset(s.out[r], 0, static_cast<size_t>(p.dv * size_of(p.dtype)));
}

template <int V>
CVMK_INLINE void few_mask(int64_t lo, int64_t hi, I* mask) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) mask[v] = inside(v * kLanes, lo, hi);
}

// The softmax of one row in registers: scores to probabilities, maximum and sum as softmax_row does them.
template <bool kPrecise, int V>
CVMK_INLINE void few_softmax(F* s, const I* mask, float c, float* top, float* total) {
  F high = simd::set(-kInf);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    s[v] = simd::select(mask[v], s[v], simd::set(-kInf));
    high = larger(s[v], high);
  }
  const float now = max_lanes(high) * c;
  const F shift = simd::set(now == -kInf ? 0.0f : now), factor = simd::set(c);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) s[v] = exp2<kPrecise>(s[v] * factor - shift);
  F sum = s[0];
  if (V == 2) sum = s[0] + s[1];
  if (V == 3) sum = (s[0] + s[2]) + s[1];
  if (V == 4) sum = (s[0] + s[2]) + (s[1] + s[3]);
  *top = now;
  *total = sum_lanes(sum);
}

// Rows [first, last) of an item with few keys.
template <class Few>
void attend_few(const Params& p, const Segment& g, int64_t kv_head, int64_t first, int64_t last, const Few& w) {
  if (first >= last) return;
  w.load_keys(p, g, kv_head);
  for (int64_t r = first; r < last; r += kFewRows) {
    FewRows rows;
    few_rows(p, g, kv_head, r, least(kFewRows, last - r), &rows);
    w.attend(p, g, &rows);
  }
}

}  // namespace
}  // namespace cvmk::attention
