// Rows of an item over a range of its keys. Keys are taken in blocks of kKeys with a running maximum and sum; every kSplit keys the state is
// closed and folded into the row's result, so that a row comes out the same to the bit whether its splits are done in turn or by several threads.
#pragma once
#include "attention/few_keys.inl"
#include "attention/state.inl"
#include "attention/teacher.inl"

namespace cvmk::attention {
namespace {

constexpr int64_t kSplit = 1024;

template <class Products, class Few>
struct ForwardScratch {
  typename Products::Element *a, *keys, *values;
  float* scores;
  float* direct_q;  // queries as floats, of an item with a single query
  State part, whole;
  TeacherBlock<Products> teacher;
  Few few;

  ForwardScratch(Arena* arena, const Params& p, int64_t pack_keys, int64_t dp, int64_t dvp) {
    teacher.take(arena, p, Products::kRows, Products::kKeys, pack_keys);
    few.take(arena, p);
    a = arena->take<typename Products::Element>(up(Products::kRows, 32) * dp);
    scores = arena->take<float>(static_cast<int64_t>(Products::kRows) * Products::kKeys);
    direct_q = arena->take<float>(kDirectRows * up(p.d, kLanes));
    part = take_state(arena, Products::kRows, dvp);
    whole = take_state(arena, Products::kRows, dvp);
    keys = arena->take<typename Products::Element>(Products::t_size(pack_keys, dp));
    values = arena->take<typename Products::Element>(Products::b_size(pack_keys, dvp));
  }
};

// Packs the keys and values [from, to) of a key head; from is a multiple of kKeys and the first row of the packs.
template <class Products>
void pack_keys(const Params& p, const Segment& g, int64_t kv_head, int64_t from, int64_t to, typename Products::Element* keys, typename Products::Element* values) {
  const int64_t width = size_of(p.dtype), dp = Products::padded(p.d), dvp = Products::padded(p.dv);
  const char* rows[Products::kGroup];
  for (int64_t j = from; j < to; j += Products::kGroup) {
    row_pointers(p.k, width, g.b, kv_head, g.k0, j, to, Products::kGroup, rows);
    Products::pack_t(keys, j - from, rows, p.dtype, p.d, dp);
    row_pointers(p.v, width, g.b, kv_head, g.k0, j, to, Products::kGroup, rows);
    Products::pack_b(values, j - from, rows, p.dtype, p.dv, dvp);
  }
}

// One block of keys into the state of the part.
template <class Products, class Few>
void attend_block(const Params& p, const Segment& g, const Row* rows, int64_t count, int64_t j, int64_t n, const typename Products::Element* keys,
                  const typename Products::Element* values, int64_t base, const ForwardScratch<Products, Few>& w, const State& state, bool first) {
  const int64_t dp = Products::padded(p.d), dvp = Products::padded(p.dv), padded = up(n, most(Products::key_step(), 2 * kLanes));
  const bool special = special_scores(p);
  const float factor = special ? 1.0f : p.scale * kLog2E;
  uint32_t columns[Products::kKeys];
  column_hashes(p, g.k0 + j, n, columns);
  const bool direct = is_single_query(p, g);
  const int64_t kv_head = rows[0].head / (p.heads / p.kv_heads), width = size_of(p.dtype);
  const Direct steps = direct_of(p.dtype);
  if (direct)
    steps.scores(row_of(p.k, width, g.b, kv_head, g.k0 + j), p.k.row * width, n, p.d, count, w.direct_q, w.scores, Products::kKeys);
  else
    Products::scores(w.a, count, keys, j - base, n, dp, w.scores, Products::kKeys);
  if (distills(p)) w.teacher.make_target(p, rows, 0, count, j, n);
  for (int64_t r = 0; r < count; ++r) {
    float* s = w.scores + r * Products::kKeys;
    const int64_t a = most(0, least(rows[r].lo - j, n)), b = most(a, least(rows[r].hi - j, n));
    if (special && a < b) finish_scores(p, g, rows[r], j, a, b, s, nullptr);
    if (distills(p)) w.teacher.divergence(p, r, a, b, s, factor, state.kl + r, state.mass + r);
    float* top = state.top + r;
    float* total = state.total + r;
    const bool drop = p.dropout_limit != 0;
    float* out = state.out + r * dvp;
    float change;
    if (direct)
      change = drop ? softmax_row<true, false, true>(s, padded, a, b, factor, top, total, columns, rows[r].hash, p.dropout_limit)
                    : softmax_row<true, false, false>(s, padded, a, b, factor, top, total, columns, 0, 0);
    else
      change = drop ? softmax_row<Products::kPrecise, Products::kTiles, true>(s, padded, a, b, factor, top, total, columns, rows[r].hash, p.dropout_limit)
                    : softmax_row<Products::kPrecise, Products::kTiles, false>(s, padded, a, b, factor, top, total, columns, 0, 0);
    if (first && direct)
      for (int64_t i = 0; i < dvp; i += kLanes) simd::store(out + i, F{});
    if (first || change == 1.0f) continue;
    for (int64_t i = 0; i < dvp; i += kLanes) simd::store(out + i, simd::load(out + i) * change);
  }
  if (!direct) return Products::weigh(w.scores, Products::kKeys, count, values, j - base, n, dvp, state.out, !first);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t a = most(0, least(rows[r].lo - j, n)), b = most(a, least(rows[r].hi - j, n));
    steps.values(row_of(p.v, width, g.b, kv_head, g.k0 + j), p.v.row * width, p.dv, a, b, w.scores + r * Products::kKeys, state.out + r * dvp);
  }
}

// Rows [first, first + count) of an item over the keys [from, to). keys and values are packs that begin at key `base`. Where `state` is
// null the rows are finished and written, else their state is left there.
template <class Products, class Few>
void attend_rows(const Params& p, const Segment& g, int64_t kv_head, int64_t first, int64_t count, int64_t from, int64_t to,
                 const typename Products::Element* keys, const typename Products::Element* values, int64_t base, ForwardScratch<Products, Few>& w,
                 const State* state) {
  const int64_t width = size_of(p.dtype), dp = Products::padded(p.d), dvp = Products::padded(p.dv);
  Row rows[Products::kRows];
  const char* q[Products::kRows];
  int64_t lo = to, hi = from;
  rows_at(p, g, kv_head, first, count, rows);
  for (int64_t r = 0; r < count; ++r) {
    q[r] = row_of(p.q, width, g.b, rows[r].head, g.q0 + rows[r].i);
    if (rows[r].lo < rows[r].hi) {
      lo = least(lo, rows[r].lo);
      hi = most(hi, rows[r].hi);
    }
  }
  lo = most(lo, from);
  hi = least(hi, to);
  const State& whole = state == nullptr ? w.whole : *state;
  clear(whole, count);
  const bool direct = is_single_query(p, g);
  if (lo < hi && !direct) Products::pack_a(w.a, q, count, p.dtype, p.d, dp);
  for (int64_t r = 0; direct && r < count; ++r) direct_of(p.dtype).query(w.direct_q + r * up(p.d, kLanes), q[r], p.d);
  if (lo < hi && distills(p)) {
    w.teacher.load_keys(p, g, rows[0].head, base, to);
    w.teacher.load_rows(p, g, rows, count);
  }
  for (int64_t split = lo / kSplit * kSplit; split < hi; split += kSplit) {
    const int64_t begin = most(split, lo) / Products::kKeys * Products::kKeys, end = least(split + kSplit, hi);
    // The first split makes the whole's state itself.
    const bool alone = split <= lo;
    const State& part = alone ? whole : w.part;
    if (!alone) clear(part, count);
    for (int64_t j = begin; j < end; j += Products::kKeys)
      attend_block<Products, Few>(p, g, rows, count, j, least(Products::kKeys, end - j), keys, values, base, w, part, j == begin);
    for (int64_t r = 0; !alone && r < count; ++r) fold_row(whole, w.part, r, dvp);
  }
  if (state != nullptr) return;
  write_rows(p, g, rows, count, whole, dvp);
}

}  // namespace
}  // namespace cvmk::attention
