// The forward pass. Keys are taken in blocks of kKeys with a running maximum and sum; every kSplit keys the state is closed and folded
// into the row's result, so that a row comes out the same to the bit whether its splits are done in turn or by several threads.
#pragma once
#include "attention/direct.inl"
#include "attention/short.inl"
#include "attention/teacher.inl"

namespace {

constexpr int64_t kSplit = 1024;

// The state of a block of rows: sum of weighted values, running maximum (of scores times log2(e)) and sum; and room for a logarithm each.
struct State {
  float *out, *top, *total, *logs;
  double *kl, *mass;  // of a distillation: sums of target * (log2 target - score), and of the target
};

template <class Engine, class Short>
struct ForwardScratch {
  typename Engine::Element *a, *keys, *values;
  float* scores;
  float* direct_q;  // queries as floats, where keys are read directly
  State part, whole;
  TeacherBlock<Engine> teacher;
  Short few;

  ForwardScratch(Arena* arena, const Params& p, int64_t pack_keys, int64_t dp, int64_t dvp) {
    teacher.take(arena, p, Engine::kRows, Engine::kKeys, pack_keys);
    few.take(arena, p);
    a = arena->take<typename Engine::Element>(up(Engine::kRows, 32) * dp);
    scores = arena->take<float>(static_cast<int64_t>(Engine::kRows) * Engine::kKeys);
    direct_q = arena->take<float>(kDirectRows * up(p.d, kLanes));
    part = take_state(arena, dvp);
    whole = take_state(arena, dvp);
    keys = arena->take<typename Engine::Element>(Engine::t_size(pack_keys, dp));
    values = arena->take<typename Engine::Element>(Engine::b_size(pack_keys, dvp));
  }

  static State take_state(Arena* arena, int64_t dvp) {
    State s;
    s.out = arena->take<float>(Engine::kRows * dvp);
    s.top = arena->take<float>(Engine::kRows);
    s.total = arena->take<float>(Engine::kRows);
    s.logs = arena->take<float>(Engine::kRows);
    s.kl = arena->take<double>(Engine::kRows);
    s.mass = arena->take<double>(Engine::kRows);
    return s;
  }
};

inline float power(float x) {
  float lanes[kLanes];
  simd::store(lanes, exp2<true>(simd::set(x)));
  return lanes[0];
}

// into += from, for one row. A part that saw nothing changes nothing.
inline void fold_row(const State& into, const State& from, int64_t r, int64_t dvp) {
  if (from.total[r] == 0.0f) return;
  into.kl[r] += from.kl[r];
  into.mass[r] += from.mass[r];
  float *a = into.out + r * dvp, *b = from.out + r * dvp;
  if (into.total[r] == 0.0f) {
    memcpy(a, b, static_cast<size_t>(dvp) * sizeof(float));
    into.top[r] = from.top[r];
    into.total[r] = from.total[r];
    return;
  }
  const float now = into.top[r] > from.top[r] ? into.top[r] : from.top[r];
  const float wa = power(into.top[r] - now), wb = power(from.top[r] - now);
  for (int64_t i = 0; i < dvp; i += kLanes) simd::store(a + i, simd::load(a + i) * wa + simd::load(b + i) * wb);
  into.total[r] = into.total[r] * wa + from.total[r] * wb;
  into.top[r] = now;
}

inline void clear(const State& s, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    s.top[r] = -kInf;
    s.total[r] = 0.0f;
    s.kl[r] = s.mass[r] = 0.0;
  }
}

// KL of a row from its sums. The target is normalised once more, so that the rounding of the teacher's log-sum-exp drops out; its mass is
// near 1, where log x = 2 (x - 1) / (x + 1) to the third order.
inline float divergence_of(double sum, double mass, double lse) {
  return static_cast<float>(sum * 0.6931471805599453 / mass - 2.0 * (mass - 1.0) / (mass + 1.0) + lse);
}

// out and lse of rows whose state is complete.
inline void write_rows(const Params& p, const Segment& g, const Row* rows, int64_t count, const State& state, int64_t dvp) {
  const int64_t width = width_of(p.dtype);
  for (int64_t r = 0; r < count; ++r) {
    if (r % kLanes == 0) simd::store(state.logs + r, simd::log(simd::load(state.total + r)));
    const float total = state.total[r], top = state.top[r];
    char* to = row_of_mutable(p.out, width, g.b, rows[r].head, g.q0 + rows[r].i);
    float* lse = reinterpret_cast<float*>(row_of_mutable(p.lse, 4, g.b, rows[r].head, g.q0 + rows[r].i));
    if (p.teacher.kl.data != nullptr) {
      float* kl = reinterpret_cast<float*>(row_of_mutable(p.teacher.kl, 4, g.b, rows[r].head, g.q0 + rows[r].i));
      *kl = total == 0.0f ? 0.0f : divergence_of(state.kl[r], state.mass[r], total < kInf ? static_cast<double>(top) * 0.6931471805599453 + state.logs[r] : total + top);
    }
    if (total == 0.0f) {
      memset(to, 0, static_cast<size_t>(p.dv * width));
      *lse = -kInf;
      continue;
    }
    if (directly(p, g))
      from_direct_row(to, p.dtype, state.out + r * dvp, p.keep_factor / total, p.dv);
    else
      from_floats(to, p.dtype, state.out + r * dvp, p.keep_factor / total, p.dv);
    *lse = total < kInf ? top * kLn2 + state.logs[r] : total + top;
  }
}

// Packs the keys and values [from, to) of a key head; from is a multiple of kKeys and the first row of the packs.
template <class Engine>
void pack_keys(const Params& p, const Segment& g, int64_t kv_head, int64_t from, int64_t to, typename Engine::Element* keys, typename Engine::Element* values) {
  const int64_t width = width_of(p.dtype), dp = Engine::padded(p.d), dvp = Engine::padded(p.dv);
  const char* rows[Engine::kGroup];
  for (int64_t j = from; j < to; j += Engine::kGroup) {
    row_pointers(p.k, width, g.b, kv_head, g.k0, j, to, Engine::kGroup, rows);
    Engine::pack_t(keys, j - from, rows, p.dtype, p.d, dp);
    row_pointers(p.v, width, g.b, kv_head, g.k0, j, to, Engine::kGroup, rows);
    Engine::pack_b(values, j - from, rows, p.dtype, p.dv, dvp);
  }
}

// One block of keys into the state of the part.
template <class Engine, class Short>
void attend_block(const Params& p, const Segment& g, const Row* rows, int64_t count, int64_t j, int64_t n, const typename Engine::Element* keys,
                  const typename Engine::Element* values, int64_t base, const ForwardScratch<Engine, Short>& w, const State& state, bool first) {
  const int64_t dp = Engine::padded(p.d), dvp = Engine::padded(p.dv), padded = up(n, most(Engine::key_step(), 2 * kLanes));
  const bool special = special_scores(p);
  const float factor = special ? 1.0f : p.scale * kLog2E;
  uint32_t columns[Engine::kKeys];
  column_hashes(p, g.k0 + j, n, columns);
  const bool direct = directly(p, g);
  const int64_t kv_head = rows[0].head / (p.heads / p.kv_heads), width = width_of(p.dtype);
  const Direct steps = direct_of(p.dtype);
  if (direct)
    steps.scores(row_of(p.k, width, g.b, kv_head, g.k0 + j), p.k.row * width, n, p.d, count, w.direct_q, w.scores, Engine::kKeys);
  else
    Engine::scores(w.a, count, keys, j - base, n, dp, w.scores, Engine::kKeys);
  if (distills(p)) w.teacher.make_target(p, rows, 0, count, j, n);
  for (int64_t r = 0; r < count; ++r) {
    float* s = w.scores + r * Engine::kKeys;
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
      change = drop ? softmax_row<Engine::kPrecise, Engine::kTiles, true>(s, padded, a, b, factor, top, total, columns, rows[r].hash, p.dropout_limit)
                    : softmax_row<Engine::kPrecise, Engine::kTiles, false>(s, padded, a, b, factor, top, total, columns, 0, 0);
    if (first && direct)
      for (int64_t i = 0; i < dvp; i += kLanes) simd::store(out + i, F{});
    if (first || change == 1.0f) continue;
    for (int64_t i = 0; i < dvp; i += kLanes) simd::store(out + i, simd::load(out + i) * change);
  }
  if (!direct) return Engine::weigh(w.scores, Engine::kKeys, count, values, j - base, n, dvp, state.out, !first);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t a = most(0, least(rows[r].lo - j, n)), b = most(a, least(rows[r].hi - j, n));
    steps.values(row_of(p.v, width, g.b, kv_head, g.k0 + j), p.v.row * width, p.dv, a, b, w.scores + r * Engine::kKeys, state.out + r * dvp);
  }
}

// Rows [first, first + count) of an item over the keys [from, to). keys and values are packs that begin at key `base`. Where `state` is
// null the rows are finished and written, else their state is left there.
template <class Engine, class Short>
void attend_rows(const Params& p, const Segment& g, int64_t kv_head, int64_t first, int64_t count, int64_t from, int64_t to,
                 const typename Engine::Element* keys, const typename Engine::Element* values, int64_t base, ForwardScratch<Engine, Short>& w,
                 const State* state) {
  const int64_t width = width_of(p.dtype), dp = Engine::padded(p.d), dvp = Engine::padded(p.dv);
  Row rows[Engine::kRows];
  const char* q[Engine::kRows];
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
  const bool direct = directly(p, g);
  if (lo < hi && !direct) Engine::pack_a(w.a, q, count, p.dtype, p.d, dp);
  for (int64_t r = 0; direct && r < count; ++r) direct_of(p.dtype).query(w.direct_q + r * up(p.d, kLanes), q[r], p.d);
  if (lo < hi && distills(p)) {
    w.teacher.load_keys(p, g, rows[0].head, base, to);
    w.teacher.load_rows(p, g, rows, count);
  }
  for (int64_t split = lo / kSplit * kSplit; split < hi; split += kSplit) {
    const int64_t begin = most(split, lo) / Engine::kKeys * Engine::kKeys, end = least(split + kSplit, hi);
    // The first split makes the whole's state itself.
    const bool alone = split <= lo;
    const State& part = alone ? whole : w.part;
    if (!alone) clear(part, count);
    for (int64_t j = begin; j < end; j += Engine::kKeys)
      attend_block<Engine, Short>(p, g, rows, count, j, least(Engine::kKeys, end - j), keys, values, base, w, part, j == begin);
    for (int64_t r = 0; !alone && r < count; ++r) fold_row(whole, w.part, r, dvp);
  }
  if (state != nullptr) return;
  write_rows(p, g, rows, count, whole, dvp);
}

// The keys that any row of a segment sees: the bounds rise from row to row.
inline void seen_keys(const Params& p, const Segment& g, int64_t* lo, int64_t* hi) {
  int64_t unused;
  *lo = *hi = 0;
  if (g.rows == 0) return;
  visible_keys(p, g, 0, lo, &unused);
  visible_keys(p, g, g.rows - 1, &unused, hi);
  *hi = most(*hi, *lo);
}

// Rows of packed tensors that belong to no sequence.
inline void write_outside(const Params& p) {
  if (p.sequences < 0) return;
  const Segment g{0, 0, p.rows, 0, 0, 0, 0};
  float zeros[4][kLanes] = {};
  double wide[2] = {};
  const State nothing{zeros[0], zeros[1], zeros[2], zeros[3], wide, wide + 1};
  const int64_t first = p.sequences == 0 ? p.rows : most(0, least(at(p.cu_q, 0), p.rows));
  const int64_t last = p.sequences == 0 ? p.rows : most(first, least(at(p.cu_q, p.sequences), p.rows));
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t i = 0; i < p.rows; ++i)
      if (i < first || i >= last) {
        const Row row{h, i, 0, 0, 0};
        write_rows(p, g, &row, 1, nothing, 0);
      }
}

// How a call is cut. An item whose rows fit one block is cut into splits of its keys; others, where items are few, into blocks of rows.
struct ForwardPlan {
  int64_t items, units, splits, blocks;  // units = items * (splits or blocks)
  bool rows_apart, short_only;
};

template <class Engine, class Short>
ForwardPlan plan_forward(const Params& p) {
  ForwardPlan plan;
  const int64_t group = p.heads / p.kv_heads, count = segments(p);
  int64_t most_rows = 0, most_keys = 0;
  plan.short_only = true;
  for (int64_t s = 0; s < count; ++s) {
    const Segment g = segment(p, s);
    most_rows = most(most_rows, g.rows * group);
    most_keys = most(most_keys, g.visible);
    plan.short_only = plan.short_only && shortly(p, g, Short::kKeys);
  }
  plan.items = count * p.kv_heads;
  const bool fits = most_rows <= Engine::kRows && (!distills(p) || group == 1);
  plan.splits = fits ? most(1, (most_keys + kSplit - 1) / kSplit) : 1;
  plan.rows_apart = !fits && !distills(p) && plan.items < 2 * threads::limit() && plan.items % threads::limit() != 0;
  plan.blocks = plan.rows_apart ? (most_rows + Engine::kRows - 1) / Engine::kRows : 1;
  plan.units = plan.items * plan.splits * plan.blocks;
  return plan;
}

// The keys of an item that a split takes.
inline void split_keys(const Params& p, const Segment& g, const ForwardPlan& plan, int64_t split, int64_t* from, int64_t* to) {
  seen_keys(p, g, from, to);
  if (plan.splits == 1) return;
  *from = most(*from, split * kSplit);
  *to = most(*from, least(*to, (split + 1) * kSplit));
}

// Rows [first, last) of an item with few keys.
template <class Short>
void attend_short(const Params& p, const Segment& g, int64_t kv_head, int64_t first, int64_t last, const Short& w) {
  if (first >= last) return;
  w.load_keys(p, g, kv_head);
  for (int64_t r = first; r < last; r += kShortRows) {
    ShortRows rows;
    short_rows(p, g, kv_head, r, least(kShortRows, last - r), &rows);
    w.attend(p, g, &rows);
  }
}

template <class Engine, class Short>
int forward(const Params& p) {
  typedef typename Engine::Element Element;
  const int64_t dp = Engine::padded(p.d), dvp = Engine::padded(p.dv), group = p.kv_heads > 0 ? p.heads / p.kv_heads : 0;
  write_outside(p);
  if (segments(p) == 0 || p.heads == 0 || p.rows == 0) return cvmk::attention::kDone;
  const ForwardPlan plan = plan_forward<Engine, Short>(p);
  const int64_t workers = least(plan.units, threads::limit());
  const int64_t longest = up(plan.splits > 1 ? least(p.keys, kSplit) : p.keys, Engine::kKeys);

  Arena arena{nullptr, 0};
  const ForwardScratch<Engine, Short> sizes(&arena, p, plan.rows_apart ? 0 : longest, dp, dvp);
  const int64_t scratch_bytes = up(arena.used, 4096);
  arena.used = 0;
  const int64_t shared_keys = plan.rows_apart ? Engine::t_size(longest, dp) : 0, shared_values = plan.rows_apart ? Engine::b_size(longest, dvp) : 0;
  arena.take<Element>((shared_keys + shared_values) * plan.items);
  const int64_t state_size = plan.splits > 1 ? up(Engine::kRows * (dvp + 7), 16) : 0;
  arena.take<float>(state_size * plan.units);
  const int64_t shared_bytes = up(arena.used, 4096);
  char* memory = allocate(scratch_bytes * workers + shared_bytes);
  if (memory == nullptr) return cvmk::attention::kNoMemory;
  Arena shared{memory + scratch_bytes * workers, 0};
  Element* packs = shared.take<Element>((shared_keys + shared_values) * plan.items);
  float* states = shared.take<float>(state_size * plan.units);
  const auto state_of = [=](int64_t unit) {
    float* base = states + unit * state_size;
    double* wide = reinterpret_cast<double*>(base + 3 * Engine::kRows);
    return State{base + 7 * Engine::kRows, base, base + Engine::kRows, base + 2 * Engine::kRows, wide, wide + Engine::kRows};
  };

  if (plan.rows_apart) {
    const int64_t chunks = longest / Engine::kKeys;
    threads::each(plan.items * chunks, [&](int64_t index) {
      const int64_t item = index / chunks, chunk = index % chunks;
      const Segment g = segment(p, item / p.kv_heads);
      int64_t lo, hi;
      seen_keys(p, g, &lo, &hi);
      if (shortly(p, g, Short::kKeys)) return;
      Element* pack = packs + item * (shared_keys + shared_values);
      const int64_t from = chunk * Engine::kKeys, to = least(from + Engine::kKeys, hi);
      if (to <= lo) return;
      Engine::begin();
      pack_keys<Engine>(p, g, item % p.kv_heads, from, to, pack + Engine::t_size(from, dp), pack + shared_keys + Engine::b_size(from, dvp));
      Engine::end();
    });
  }

  const auto attend_unit = [&](int64_t unit, ForwardScratch<Engine, Short>& w) {
    const int64_t item = unit / (plan.splits * plan.blocks), part = unit % (plan.splits * plan.blocks);
    const Segment g = segment(p, item / p.kv_heads);
    const int64_t kv_head = item % p.kv_heads, rows = g.rows * group;
    const int64_t first = plan.rows_apart ? part * Engine::kRows : 0, last = plan.rows_apart ? least(first + Engine::kRows, rows) : rows;
    if (shortly(p, g, Short::kKeys)) {
      if (plan.rows_apart || part == 0) attend_short(p, g, kv_head, first, last, w.few);
      return;
    }
    int64_t from, to;
    split_keys(p, g, plan, part, &from, &to);
    const int64_t base = plan.rows_apart ? 0 : from / Engine::kKeys * Engine::kKeys;
    const Element* keys = plan.rows_apart ? packs + item * (shared_keys + shared_values) : w.keys;
    const Element* values = plan.rows_apart ? keys + shared_keys : w.values;
    if (!plan.rows_apart && from < to && !directly(p, g)) pack_keys<Engine>(p, g, kv_head, base, to, w.keys, w.values);
    w.teacher.packed = -1;
    const State state = state_of(unit);
    for (int64_t r = first; r < last;) {
      const int64_t count = block_rows(p, g, r, last, Engine::kRows);
      attend_rows<Engine, Short>(p, g, kv_head, r, count, from, to, keys, values, base, w, plan.splits > 1 ? &state : nullptr);
      r += count;
    }
  };
  // Small units: a stretch for each thread, which finds in its cache what it wrote there before. Others several at a time, the later ones
  // first: where rows are causal, those are the longer ones.
  const int64_t step = plan.short_only ? (plan.units + workers - 1) / workers : most(1, plan.units / (16 * workers));
  const int64_t pieces = (plan.units + step - 1) / step;
  threads::each(pieces, [&](int64_t index) {
    Arena own{memory + scratch_bytes * threads::index(), 0};
    ForwardScratch<Engine, Short> w(&own, p, plan.rows_apart ? 0 : longest, dp, dvp);
    Engine::begin();
    const int64_t last = least(plan.units, (plan.short_only ? index + 1 : pieces - index) * step);
    for (int64_t unit = last - 1; unit >= last - 1 - (last - 1) % step; --unit) attend_unit(unit, w);
    Engine::end();
  });

  if (plan.splits > 1) {
    const auto combine = [&](int64_t item) {
      const Segment g = segment(p, item / p.kv_heads);
      if (shortly(p, g, Short::kKeys)) return;
      const State whole = state_of(item * plan.splits);
      Row rows[Engine::kRows];
      rows_at(p, g, item % p.kv_heads, 0, g.rows * group, rows);
      for (int64_t r = 0; r < g.rows * group; ++r)
        for (int64_t split = 1; split < plan.splits; ++split) fold_row(whole, state_of(item * plan.splits + split), r, dvp);
      write_rows(p, g, rows, g.rows * group, whole, dvp);
    };
    // A few rows take less time than waking a thread.
    if (plan.units * group * dvp <= 16384)
      for (int64_t item = 0; item < plan.items; ++item) combine(item);
    else
      threads::each(plan.items, combine);
  }
  free(memory);
  return cvmk::attention::kDone;
}

}  // namespace
