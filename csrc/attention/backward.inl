// The backward pass. Where there are many items, an item is done as a whole: for every block of rows, every block of keys, five products.
// Where there are few, blocks of rows gather dq and, in a second pass, chunks of keys gather dk and dv; scores are then computed twice.
// Both ways add in the same order: rows and keys always rise. Items with few keys come first, in a way of their own (Short).
#pragma once
#include "attention/forward.inl"
#include "attention/gradient.inl"
#include "attention/short.inl"

namespace {

template <class Gradient>
KeyPacks<typename Gradient::Engine::Element> take_packs(Arena* arena, int64_t keys, int64_t dp, int64_t dvp) {
  typedef typename Gradient::Engine Engine;
  KeyPacks<typename Engine::Element> packs;
  packs.k_t = arena->take<typename Engine::Element>(Engine::t_size(keys, dp));
  packs.v_t = arena->take<typename Engine::Element>(Engine::t_size(keys, dvp));
  packs.k_b = arena->take<typename Engine::Element>(Engine::b_size(keys, dp));
  packs.base = 0;
  return packs;
}

template <class Gradient>
struct BackwardScratch {
  typedef typename Gradient::Engine::Element Element;
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
void pack_grad_keys(const Params& p, const Segment& g, int64_t kv_head, int64_t from, int64_t to, const KeyPacks<typename Gradient::Engine::Element>& packs) {
  typedef typename Gradient::Engine Engine;
  const int64_t width = width_of(p.dtype), dp = Engine::padded(p.d), dvp = Engine::padded(p.dv);
  const char* rows[Engine::kGroup];
  for (int64_t j = from; j < to; j += Engine::kGroup) {
    row_pointers(p.k, width, g.b, kv_head, g.k0, j, to, Engine::kGroup, rows);
    Engine::pack_t(packs.k_t, j - packs.base, rows, p.dtype, p.d, dp);
    if (p.dq.data != nullptr) Engine::pack_b(packs.k_b, j - packs.base, rows, p.dtype, p.d, dp);
    row_pointers(p.v, width, g.b, kv_head, g.k0, j, to, Engine::kGroup, rows);
    Engine::pack_t(packs.v_t, j - packs.base, rows, p.dtype, p.dv, dvp);
  }
}

// Rows [first, last) of an item against the keys [from, to); sums where they are given.
template <class Gradient>
void grad_rows(const Params& p, const Segment& g, int64_t kv_head, int64_t first, int64_t last, int64_t from, int64_t to, BackwardScratch<Gradient>& w,
               const KeyPacks<typename Gradient::Engine::Element>& packs, const GradSums& sums) {
  const int64_t dp = Gradient::Engine::padded(p.d), dvp = Gradient::Engine::padded(p.dv);
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
      char* to_row = row_of_mutable(p.dq, width_of(p.dtype), g.b, rows->rows[i].head, g.q0 + rows->rows[i].i);
      if (lo < hi)
        from_floats(to_row, p.dtype, w.dq + i * dp, p.scale, p.d);
      else
        memset(to_row, 0, static_cast<size_t>(p.d * width_of(p.dtype)));
    }
  }
}

inline void zero_rows(const Matrix& m, const Params& p, const Segment& g, int64_t kv_head, int64_t from, int64_t to, int64_t n) {
  for (int64_t j = from; m.data != nullptr && j < to; ++j)
    memset(row_of_mutable(m, width_of(p.dtype), g.b, kv_head, g.k0 + j), 0, static_cast<size_t>(n * width_of(p.dtype)));
}

// dk and dv of the keys [from, to) of an item, from all its rows; keys outside [lo, hi) are seen by nobody.
template <class Gradient>
void grad_keys(const Params& p, const Segment& g, int64_t kv_head, int64_t from, int64_t to, int64_t lo, int64_t hi, BackwardScratch<Gradient>& w,
               const KeyPacks<typename Gradient::Engine::Element>& packs, bool with_dq) {
  const int64_t dp = Gradient::Engine::padded(p.d), dvp = Gradient::Engine::padded(p.dv), rows = g.rows * (p.heads / p.kv_heads);
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

template <class Short>
bool grads_shortly(const Params& p, const Segment& g) {
  return p.grad_out.data != nullptr && shortly(p, g, Short::kKeys);
}

// The items with few keys.
template <class Short>
int backward_short(const Params& p) {
  const int64_t items = segments(p) * p.kv_heads, workers = least(items, threads::limit());
  Arena arena{nullptr, 0};
  Short sizes;
  sizes.take(&arena, p);
  const int64_t bytes = up(arena.used, 4096);
  char* memory = allocate(bytes * workers);
  if (memory == nullptr) return cvmk::attention::kNoMemory;
  // A stretch for each thread, which finds in its cache what the forward pass left there.
  const int64_t step = (items + workers - 1) / workers;
  threads::each((items + step - 1) / step, [&](int64_t piece) {
    Arena own{memory + bytes * threads::index(), 0};
    Short w;
    w.take(&own, p);
    for (int64_t item = piece * step; item < least(items, (piece + 1) * step); ++item) {
      const Segment g = segment(p, item / p.kv_heads);
      if (grads_shortly<Short>(p, g)) w.item(p, g, item % p.kv_heads);
    }
  });
  free(memory);
  return cvmk::attention::kDone;
}

template <class Gradient, class Short>
int backward_items(const Params& p) {
  const int64_t dp = Gradient::Engine::padded(p.d), dvp = Gradient::Engine::padded(p.dv), items = segments(p) * p.kv_heads;
  const int64_t longest = up(p.keys, Gradient::kKeys), workers = least(items, threads::limit());
  Arena arena{nullptr, 0};
  const BackwardScratch<Gradient> sizes(&arena, p, longest, longest, dp, dvp);
  const int64_t bytes = up(arena.used, 4096);
  char* memory = allocate(bytes * workers);
  if (memory == nullptr) return cvmk::attention::kNoMemory;
  const int64_t step = most(1, items / (16 * workers));
  threads::each((items + step - 1) / step, [&](int64_t piece) {
    Arena own{memory + bytes * threads::index(), 0};
    BackwardScratch<Gradient> w(&own, p, longest, longest, dp, dvp);
    Gradient::Engine::begin();
    for (int64_t item = piece * step; item < least(items, (piece + 1) * step); ++item) {
      const Segment g = segment(p, item / p.kv_heads);
      if (grads_shortly<Short>(p, g)) continue;
      int64_t lo, hi;
      seen_keys(p, g, &lo, &hi);
      w.packs.base = lo / Gradient::kKeys * Gradient::kKeys;
      w.gradient.teacher.packed = -1;
      if (lo < hi) pack_grad_keys<Gradient>(p, g, item % p.kv_heads, w.packs.base, hi, w.packs);
      grad_keys<Gradient>(p, g, item % p.kv_heads, 0, g.keys, lo, hi, w, w.packs, true);
    }
    Gradient::Engine::end();
  });
  free(memory);
  return cvmk::attention::kDone;
}

template <class Gradient, class Short>
int backward_pieces(const Params& p) {
  typedef typename Gradient::Engine Engine;
  constexpr int64_t kChunk = 4 * Gradient::kKeys;
  const int64_t dp = Engine::padded(p.d), dvp = Engine::padded(p.dv), items = segments(p) * p.kv_heads, group = p.heads / p.kv_heads;
  const int64_t longest = up(p.keys, Gradient::kKeys), workers = threads::limit();
  Arena arena{nullptr, 0};
  const BackwardScratch<Gradient> sizes(&arena, p, 0, kChunk, dp, dvp);
  const int64_t bytes = up(arena.used, 4096);
  arena.used = 0;
  take_packs<Gradient>(&arena, longest, dp, dvp);
  const int64_t pack_bytes = up(arena.used, 4096);
  char* memory = allocate(bytes * workers + pack_bytes * items);
  if (memory == nullptr) return cvmk::attention::kNoMemory;
  const auto packs_of = [&](int64_t item) {
    Arena shared{memory + bytes * workers + pack_bytes * item, 0};
    return take_packs<Gradient>(&shared, longest, dp, dvp);
  };

  const int64_t chunks = (p.keys + kChunk - 1) / kChunk;
  threads::each(items * chunks, [&](int64_t index) {
    const int64_t item = index / chunks, from = index % chunks * kChunk;
    const Segment g = segment(p, item / p.kv_heads);
    if (grads_shortly<Short>(p, g)) return;
    int64_t lo, hi;
    seen_keys(p, g, &lo, &hi);
    const int64_t to = least(from + kChunk, hi);
    if (from < to && lo < to) pack_grad_keys<Gradient>(p, g, item % p.kv_heads, from, to, packs_of(item));
  });
  const int64_t blocks = p.dq.data == nullptr ? 0 : (p.rows * group + Gradient::kRows - 1) / Gradient::kRows;
  threads::each(items * blocks, [&](int64_t index) {
    const int64_t item = index / blocks, first = (blocks - 1 - index % blocks) * Gradient::kRows;
    const Segment g = segment(p, item / p.kv_heads);
    const int64_t rows = g.rows * group;
    if (first >= rows || grads_shortly<Short>(p, g)) return;
    Arena own{memory + bytes * threads::index(), 0};
    BackwardScratch<Gradient> w(&own, p, 0, kChunk, dp, dvp);
    int64_t lo, hi;
    seen_keys(p, g, &lo, &hi);
    Engine::begin();
    grad_rows<Gradient>(p, g, item % p.kv_heads, first, least(first + Gradient::kRows, rows), lo, hi, w, packs_of(item), GradSums{w.dq, nullptr, nullptr, 0});
    Engine::end();
  });
  if (p.dk.data != nullptr || p.dv_.data != nullptr) {
    threads::each(items * chunks, [&](int64_t index) {
      const int64_t item = index / chunks, from = index % chunks * kChunk;
      const Segment g = segment(p, item / p.kv_heads);
      if (from >= g.keys || grads_shortly<Short>(p, g)) return;
      Arena own{memory + bytes * threads::index(), 0};
      BackwardScratch<Gradient> w(&own, p, 0, kChunk, dp, dvp);
      int64_t lo, hi;
      seen_keys(p, g, &lo, &hi);
      Engine::begin();
      grad_keys<Gradient>(p, g, item % p.kv_heads, from, least(from + kChunk, g.keys), lo, hi, w, packs_of(item), false);
      Engine::end();
    });
  }
  free(memory);
  return cvmk::attention::kDone;
}

template <class Gradient, class Short>
int backward(const Params& p) {
  bool few_keys = false, many_keys = false;
  for (int64_t s = 0; s < segments(p); ++s) (grads_shortly<Short>(p, segment(p, s)) ? few_keys : many_keys) = true;
  if (few_keys) {
    const int status = backward_short<Short>(p);
    if (status != cvmk::attention::kDone) return status;
  }
  if (!many_keys) return cvmk::attention::kDone;
  const int64_t items = segments(p) * p.kv_heads, workers = threads::limit();
  const bool few = !distills(p) && items % workers != 0 && items < 2 * workers && p.rows * (p.heads / p.kv_heads) > Gradient::kRows;
  return few ? backward_pieces<Gradient, Short>(p) : backward_items<Gradient, Short>(p);
}

}  // namespace
