// The backward pass. Where there are many items, an item is done as a whole: for every block of rows, every block of keys, five products.
// Where there are few, blocks of rows gather dq and, in a second pass, chunks of keys gather dk and dv; scores are then computed twice.
// Both ways add in the same order: rows and keys always rise. Items with few keys come first, in a way of their own (Few).
#pragma once
#include "attention/few_keys.inl"
#include "attention/gradient.inl"

namespace cvmk::attention {
namespace {

template <class Gradient>
KeyPacks<typename Gradient::Products::Element> take_packs(Arena* arena, int64_t keys, int64_t dp, int64_t dvp) {
  typedef typename Gradient::Products Products;
  KeyPacks<typename Products::Element> packs;
  packs.k_t = arena->take<typename Products::Element>(Products::t_size(keys, dp));
  packs.v_t = arena->take<typename Products::Element>(Products::t_size(keys, dvp));
  packs.k_b = arena->take<typename Products::Element>(Products::b_size(keys, dp));
  packs.base = 0;
  return packs;
}

template <class Gradient>
struct BackwardScratch {
  typedef typename Gradient::Products::Element Element;
  Gradient gradient;
  GradRows<Gradient::kRows>* rows;
  float *dq, *dk, *dv;
  KeyPacks<Element> packs;

  BackwardScratch(Arena* arena, const Params& p, int64_t pack_keys, int64_t sum_keys, int64_t dp, int64_t dvp) {
    gradient.take(arena, p, pack_keys, dp, dvp);
    rows = arena->take<GradRows<Gradient::kRows>>(1);
    dq = arena->take<float>(Gradient::kRows * dp);
    dk = arena->take<float>(Gradient::sum_size(sum_keys, dp));
    dv = arena->take<float>(Gradient::sum_size(sum_keys, dvp));
    packs = take_packs<Gradient>(arena, pack_keys, dp, dvp);
  }
};

// The keys [from, to) into packs that begin at a block boundary at or before `from`.
template <class Gradient>
void pack_grad_keys(const Params& p, const Segment& g, int64_t kv_head, int64_t from, int64_t to, const KeyPacks<typename Gradient::Products::Element>& packs) {
  typedef typename Gradient::Products Products;
  const int64_t width = size_of(p.dtype), dp = Products::padded(p.d), dvp = Products::padded(p.dv);
  const char* rows[Products::kGroup];
  for (int64_t j = from; j < to; j += Products::kGroup) {
    row_pointers(p.k, width, g.b, kv_head, g.k0, j, to, Products::kGroup, rows);
    Products::pack_t(packs.k_t, j - packs.base, rows, p.dtype, p.d, dp);
    if (p.dq.data != nullptr) Products::pack_b(packs.k_b, j - packs.base, rows, p.dtype, p.d, dp);
    row_pointers(p.v, width, g.b, kv_head, g.k0, j, to, Products::kGroup, rows);
    Products::pack_t(packs.v_t, j - packs.base, rows, p.dtype, p.dv, dvp);
  }
}

// Rows [first, last) of an item against the keys [from, to); sums where they are given.
template <class Gradient>
void grad_rows(const Params& p, const Segment& g, int64_t kv_head, int64_t first, int64_t last, int64_t from, int64_t to, BackwardScratch<Gradient>& w,
               const KeyPacks<typename Gradient::Products::Element>& packs, const GradSums& sums) {
  const int64_t dp = Gradient::Products::padded(p.d), dvp = Gradient::Products::padded(p.dv);
  for (int64_t r = first; r < last; r += w.rows->count) {
    GradRows<Gradient::kRows>* rows = w.rows;
    load_rows(p, g, kv_head, r, block_rows(p, g, r, last, Gradient::kRows), rows);
    const int64_t lo = most(from, rows->lo), hi = least(to, rows->hi), begin = lo / Gradient::kKeys * Gradient::kKeys;
    if (lo < hi) w.gradient.load(p, *rows, dp, dvp);
    if (lo < hi && p.teacher.grad_kl.data != nullptr) {
      w.gradient.teacher.load_keys(p, g, rows->rows[0].head, packs.base, to);
      w.gradient.teacher.load_rows(p, g, rows->rows, rows->count);
    }
    for (int64_t j = begin; lo < hi && j < hi; j += Gradient::kKeys)
      w.gradient.block(p, g, *rows, j, least(Gradient::kKeys, hi - j), packs, sums, dp, dvp, j == begin);
    for (int64_t i = 0; sums.dq != nullptr && i < rows->count; ++i) {
      char* to_row = row_of_mutable(p.dq, size_of(p.dtype), g.b, rows->rows[i].head, g.q0 + rows->rows[i].i);
      if (lo < hi)
        elements::from_floats(to_row, p.dtype, w.dq + i * dp, p.scale, p.d);
      else
        memset(to_row, 0, static_cast<size_t>(p.d * size_of(p.dtype)));
    }
  }
}

inline void zero_rows(const Matrix& m, const Params& p, const Segment& g, int64_t kv_head, int64_t from, int64_t to, int64_t n) {
  for (int64_t j = from; m.data != nullptr && j < to; ++j)
    memset(row_of_mutable(m, size_of(p.dtype), g.b, kv_head, g.k0 + j), 0, static_cast<size_t>(n * size_of(p.dtype)));
}

// dk and dv of the keys [from, to) of an item, from all its rows; keys outside [lo, hi) are seen by nobody.
template <class Gradient>
void grad_keys(const Params& p, const Segment& g, int64_t kv_head, int64_t from, int64_t to, int64_t lo, int64_t hi, BackwardScratch<Gradient>& w,
               const KeyPacks<typename Gradient::Products::Element>& packs, bool with_dq) {
  const int64_t dp = Gradient::Products::padded(p.d), dvp = Gradient::Products::padded(p.dv), rows = g.rows * (p.heads / p.kv_heads);
  const int64_t begin = most(from, lo), end = most(begin, least(to, hi)), base = begin / Gradient::kKeys * Gradient::kKeys;
  GradSums sums{with_dq && p.dq.data != nullptr ? w.dq : nullptr, p.dk.data != nullptr ? w.dk : nullptr, p.dv_.data != nullptr ? w.dv : nullptr, base};
  if (sums.dk != nullptr) Gradient::clear(sums.dk, end - base, dp);
  if (sums.dv != nullptr) Gradient::clear(sums.dv, end - base, dvp);
  if (begin < end || sums.dq != nullptr) grad_rows<Gradient>(p, g, kv_head, 0, rows, begin, end, w, packs, sums);
  zero_rows(p.dk, p, g, kv_head, from, least(begin, to), p.d);
  zero_rows(p.dv_, p, g, kv_head, from, least(begin, to), p.dv);
  if (sums.dk != nullptr) Gradient::write(p.dk, p, g, kv_head, sums.dk, base, begin, end, p.d, dp, p.scale);
  if (sums.dv != nullptr) Gradient::write(p.dv_, p, g, kv_head, sums.dv, base, begin, end, p.dv, dvp, p.keep_factor);
  zero_rows(p.dk, p, g, kv_head, most(end, from), to, p.d);
  zero_rows(p.dv_, p, g, kv_head, most(end, from), to, p.dv);
}

template <class Few>
bool gradient_has_few_keys(const Params& p, const Segment& g) {
  return p.grad_out.data != nullptr && has_few_keys(p, g, Few::kKeys);
}

inline bool wants_gradients(const Params& p) { return p.dq.data != nullptr || p.dk.data != nullptr || p.dv_.data != nullptr; }

// -- the items with few keys ----------------------------------------------------------------------------------------------------------
template <class Few>
struct FewItems {
  int64_t items, workers, own_bytes;
  char* own;

  FewItems(const Params& p, const Team& team, Arena* arena) : items(segments(p) * p.kv_heads), workers(least(items, team.size)) {
    Arena one;
    Few sizes;
    sizes.take(&one, p);
    own_bytes = up(one.used, 4096);
    own = arena->take<char>(own_bytes * workers);
  }

  void run(const Params& p, const Team& team) const {
    // A stretch for each thread, which finds in its cache what the forward pass left there.
    const int64_t step = pieces(items, workers);
    team.each(pieces(items, step), [&](int64_t piece, int thread) {
      Arena arena{own + own_bytes * thread};
      Few w;
      w.take(&arena, p);
      for (int64_t item = piece * step; item < least(items, (piece + 1) * step); ++item) {
        const Segment g = segment(p, item / p.kv_heads);
        if (gradient_has_few_keys<Few>(p, g)) w.item(p, g, item % p.kv_heads);
      }
    });
  }
};

// -- whole items ----------------------------------------------------------------------------------------------------------------------
template <class Gradient, class Few>
struct WholeItems {
  typedef typename Gradient::Products Products;
  int64_t dp, dvp, items, longest, workers, own_bytes;
  char* own;

  WholeItems(const Params& p, const Team& team, Arena* arena)
      : dp(Products::padded(p.d)), dvp(Products::padded(p.dv)), items(segments(p) * p.kv_heads), longest(up(p.keys, Gradient::kKeys)), workers(least(items, team.size)) {
    Arena one;
    BackwardScratch<Gradient>(&one, p, longest, longest, dp, dvp);
    own_bytes = up(one.used, 4096);
    own = arena->take<char>(own_bytes * workers);
  }

  void run(const Params& p, const Team& team) const {
    const int64_t step = most(1, items / (16 * workers));
    team.each(pieces(items, step), [&](int64_t piece, int thread) {
      Arena arena{own + own_bytes * thread};
      BackwardScratch<Gradient> w(&arena, p, longest, longest, dp, dvp);
      Products::begin();
      for (int64_t item = piece * step; item < least(items, (piece + 1) * step); ++item) one_item(p, item, w);
      Products::end();
    });
  }

  void one_item(const Params& p, int64_t item, BackwardScratch<Gradient>& w) const {
    const Segment g = segment(p, item / p.kv_heads);
    if (gradient_has_few_keys<Few>(p, g)) return;
    int64_t lo, hi;
    seen_keys(p, g, &lo, &hi);
    w.packs.base = lo / Gradient::kKeys * Gradient::kKeys;
    w.gradient.teacher.packed = -1;
    if (lo < hi) pack_grad_keys<Gradient>(p, g, item % p.kv_heads, w.packs.base, hi, w.packs);
    grad_keys<Gradient>(p, g, item % p.kv_heads, 0, g.keys, lo, hi, w, w.packs, true);
  }
};

// -- items in pieces ------------------------------------------------------------------------------------------------------------------
template <class Gradient, class Few>
struct ItemPieces {
  typedef typename Gradient::Products Products;
  typedef KeyPacks<typename Products::Element> Packs;
  static constexpr int64_t kChunk = 4 * Gradient::kKeys;
  int64_t dp, dvp, items, group, longest, chunks, own_bytes, pack_bytes;
  char *own, *packs;  // a scratch a thread, the packs of every item

  ItemPieces(const Params& p, const Team& team, Arena* arena)
      : dp(Products::padded(p.d)), dvp(Products::padded(p.dv)), items(segments(p) * p.kv_heads), group(p.heads / p.kv_heads), longest(up(p.keys, Gradient::kKeys)), chunks(pieces(p.keys, kChunk)) {
    Arena one, item;
    BackwardScratch<Gradient>(&one, p, 0, kChunk, dp, dvp);
    take_packs<Gradient>(&item, longest, dp, dvp);
    own_bytes = up(one.used, 4096);
    pack_bytes = up(item.used, 4096);
    own = arena->take<char>(own_bytes * team.size);
    packs = arena->take<char>(pack_bytes * items);
  }

  Packs packs_of(int64_t item) const {
    Arena arena{packs + pack_bytes * item};
    return take_packs<Gradient>(&arena, longest, dp, dvp);
  }
  BackwardScratch<Gradient> scratch_of(const Params& p, int thread) const {
    Arena arena{own + own_bytes * thread};
    return BackwardScratch<Gradient>(&arena, p, 0, kChunk, dp, dvp);
  }

  void run(const Params& p, const Team& team) const {
    team.each(items * chunks, [&](int64_t index, int) { pack(p, index / chunks, index % chunks * kChunk); });
    const int64_t blocks = p.dq.data == nullptr ? 0 : pieces(p.rows * group, Gradient::kRows);
    team.each(items * blocks, [&](int64_t index, int thread) { rows(p, index / blocks, (blocks - 1 - index % blocks) * Gradient::kRows, thread); });
    if (p.dk.data != nullptr || p.dv_.data != nullptr)
      team.each(items * chunks, [&](int64_t index, int thread) { keys(p, index / chunks, index % chunks * kChunk, thread); });
  }

  void pack(const Params& p, int64_t item, int64_t from) const {
    const Segment g = segment(p, item / p.kv_heads);
    if (gradient_has_few_keys<Few>(p, g)) return;
    int64_t lo, hi;
    seen_keys(p, g, &lo, &hi);
    const int64_t to = least(from + kChunk, hi);
    if (from < to && lo < to) pack_grad_keys<Gradient>(p, g, item % p.kv_heads, from, to, packs_of(item));
  }

  // dq of a block of rows.
  void rows(const Params& p, int64_t item, int64_t first, int thread) const {
    const Segment g = segment(p, item / p.kv_heads);
    const int64_t count = g.rows * group;
    if (first >= count || gradient_has_few_keys<Few>(p, g)) return;
    BackwardScratch<Gradient> w = scratch_of(p, thread);
    int64_t lo, hi;
    seen_keys(p, g, &lo, &hi);
    Products::begin();
    grad_rows<Gradient>(p, g, item % p.kv_heads, first, least(first + Gradient::kRows, count), lo, hi, w, packs_of(item), GradSums{w.dq, nullptr, nullptr, 0});
    Products::end();
  }

  // dk and dv of a chunk of keys.
  void keys(const Params& p, int64_t item, int64_t from, int thread) const {
    const Segment g = segment(p, item / p.kv_heads);
    if (from >= g.keys || gradient_has_few_keys<Few>(p, g)) return;
    BackwardScratch<Gradient> w = scratch_of(p, thread);
    int64_t lo, hi;
    seen_keys(p, g, &lo, &hi);
    Products::begin();
    grad_keys<Gradient>(p, g, item % p.kv_heads, from, least(from + kChunk, g.keys), lo, hi, w, packs_of(item), false);
    Products::end();
  }
};

// Which of these ways a call takes.
template <class Gradient, class Few>
struct BackwardPlan {
  bool few = false, whole = false, in_pieces = false;

  BackwardPlan(const Params& p, const Team& team) {
    if (!wants_gradients(p)) return;
    bool many_keys = false;
    for (int64_t s = 0; s < segments(p); ++s) (gradient_has_few_keys<Few>(p, segment(p, s)) ? few : many_keys) = true;
    if (!many_keys) return;
    const int64_t items = segments(p) * p.kv_heads;
    in_pieces = !distills(p) && items % team.size != 0 && items < 2 * team.size && p.rows * (p.heads / p.kv_heads) > Gradient::kRows;
    whole = !in_pieces;
  }
};

}  // namespace
}  // namespace cvmk::attention
