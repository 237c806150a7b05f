// The forward pass: how a call is cut into units of work, their run, and the combination of units that share rows.
#pragma once
#include "attention/attend.inl"
#include "attention/coarse_forward.inl"

namespace cvmk::attention {
namespace {

// An item whose rows fit one block is cut into splits of its keys; others, where items are few, into blocks of rows.
template <class Products, class Few>
struct ForwardPlan {
  typedef typename Products::Element Element;
  typedef ForwardScratch<Products, Few> Scratch;

  int64_t items = 0, units = 0, splits = 1, blocks = 1;  // units = items * (splits or blocks)
  bool rows_apart = false, few_only = true;
  int64_t group = 0, dp, dvp;
  int64_t longest = 0;                     // keys of a pack
  int64_t workers = 0, own_bytes = 0;      // of each thread
  int64_t pack_keys_size = 0, pack_size = 0, state_bytes = 0;
  char *own = nullptr, *states = nullptr;  // a scratch a thread; the state of every unit, where units share rows
  Element* packs = nullptr;                // keys and values of every item, where units share these

  ForwardPlan(const Params& p, const Team& team, Arena* arena) : dp(Products::padded(p.d)), dvp(Products::padded(p.dv)) {
    if (segments(p) == 0 || p.heads == 0 || p.rows == 0) return;
    cut(p, team);
    longest = up(splits > 1 ? least(p.keys, kSplit) : p.keys, Products::kKeys);
    workers = least(units, team.size);
    Arena one;
    Scratch(&one, p, own_keys(), dp, dvp);
    own_bytes = up(one.used, 4096);
    own = arena->take<char>(own_bytes * workers);
    if (rows_apart) {
      pack_keys_size = Products::t_size(longest, dp);
      pack_size = pack_keys_size + Products::b_size(longest, dvp);
      packs = arena->take<Element>(pack_size * items);
    }
    if (splits > 1) {
      Arena state;
      take_state(&state, Products::kRows, dvp);
      state_bytes = state.used;
      states = arena->take<char>(state_bytes * units);
    }
  }

  void cut(const Params& p, const Team& team) {
    const int64_t count = segments(p);
    int64_t most_rows = 0, most_keys = 0;
    group = p.heads / p.kv_heads;
    for (int64_t s = 0; s < count; ++s) {
      const Segment g = segment(p, s);
      most_rows = most(most_rows, g.rows * group);
      most_keys = most(most_keys, g.visible);
      few_only = few_only && has_few_keys(p, g, Few::kKeys);
    }
    items = count * p.kv_heads;
    const bool fits = most_rows <= Products::kRows && (!distills(p) || group == 1);
    if (fits) splits = most(1, pieces(most_keys, kSplit));
    rows_apart = !fits && !distills(p) && items < 2 * team.size && items % team.size != 0;
    if (rows_apart) blocks = pieces(most_rows, Products::kRows);
    units = items * splits * blocks;
  }

  // Keys that a thread packs for itself.
  int64_t own_keys() const { return rows_apart ? 0 : longest; }

  Scratch scratch_of(const Params& p, int thread) const {
    Arena arena{own + own_bytes * thread};
    return Scratch(&arena, p, own_keys(), dp, dvp);
  }

  State state_of(int64_t unit) const {
    Arena arena{states + state_bytes * unit};
    return take_state(&arena, Products::kRows, dvp);
  }

  // The keys of an item that a split takes.
  void split_keys(const Params& p, const Segment& g, int64_t split, int64_t* from, int64_t* to) const {
    seen_keys(p, g, from, to);
    if (splits == 1) return;
    *from = most(*from, split * kSplit);
    *to = most(*from, least(*to, (split + 1) * kSplit));
  }
};

// One block of an item's keys and values into the pack that its units share.
template <class Products, class Few>
void pack_block(const ForwardPlan<Products, Few>& plan, const Params& p, int64_t item, int64_t from) {
  const Segment g = segment(p, item / p.kv_heads);
  int64_t lo, hi;
  seen_keys(p, g, &lo, &hi);
  const int64_t to = least(from + Products::kKeys, hi);
  if (has_few_keys(p, g, Few::kKeys) || to <= lo) return;
  typename Products::Element* pack = plan.packs + item * plan.pack_size;
  Products::begin();
  pack_keys<Products>(p, g, item % p.kv_heads, from, to, pack + Products::t_size(from, plan.dp), pack + plan.pack_keys_size + Products::b_size(from, plan.dvp));
  Products::end();
}

template <class Products, class Few>
void attend_unit(const ForwardPlan<Products, Few>& plan, const Params& p, int64_t unit, ForwardScratch<Products, Few>& w) {
  typedef typename Products::Element Element;
  const int64_t item = unit / (plan.splits * plan.blocks), part = unit % (plan.splits * plan.blocks);
  const Segment g = segment(p, item / p.kv_heads);
  const int64_t kv_head = item % p.kv_heads, rows = g.rows * plan.group;
  const int64_t first = plan.rows_apart ? part * Products::kRows : 0, last = plan.rows_apart ? least(first + Products::kRows, rows) : rows;
  if (has_few_keys(p, g, Few::kKeys)) {
    if (plan.rows_apart || part == 0) attend_few(p, g, kv_head, first, last, w.few);
    return;
  }
  int64_t from, to;
  plan.split_keys(p, g, part, &from, &to);
  const int64_t base = plan.rows_apart ? 0 : from / Products::kKeys * Products::kKeys;
  const Element* keys = plan.rows_apart ? plan.packs + item * plan.pack_size : w.keys;
  const Element* values = plan.rows_apart ? keys + plan.pack_keys_size : w.values;
  if (!plan.rows_apart && from < to && !is_single_query(p, g)) pack_keys<Products>(p, g, kv_head, base, to, w.keys, w.values);
  w.teacher.packed = -1;
  const State state = plan.splits > 1 ? plan.state_of(unit) : State{};
  for (int64_t r = first; r < last;) {
    const int64_t count = block_rows(p, g, r, last, Products::kRows);
    attend_rows<Products, Few>(p, g, kv_head, r, count, from, to, keys, values, base, w, plan.splits > 1 ? &state : nullptr);
    r += count;
  }
}

// All units. Small ones: a stretch for each thread, which finds in its cache what it wrote there before. Others several at a time, the later
// ones first: where rows are causal, those are the longer ones.
template <class Products, class Few>
void attend_units(const ForwardPlan<Products, Few>& plan, const Params& p, const Team& team) {
  const int64_t step = plan.few_only ? pieces(plan.units, plan.workers) : most(1, plan.units / (16 * plan.workers));
  const int64_t count = pieces(plan.units, step);
  team.each(count, [&](int64_t index, int thread) {
    ForwardScratch<Products, Few> w = plan.scratch_of(p, thread);
    Products::begin();
    const int64_t last = least(plan.units, (plan.few_only ? index + 1 : count - index) * step);
    for (int64_t unit = last - 1; unit >= last - 1 - (last - 1) % step; --unit) attend_unit(plan, p, unit, w);
    Products::end();
  });
}

// The splits of an item's keys into its results.
template <class Products, class Few>
void combine(const ForwardPlan<Products, Few>& plan, const Params& p, int64_t item) {
  const Segment g = segment(p, item / p.kv_heads);
  if (has_few_keys(p, g, Few::kKeys)) return;
  const int64_t count = g.rows * plan.group;
  const State whole = plan.state_of(item * plan.splits);
  Row rows[Products::kRows];
  rows_at(p, g, item % p.kv_heads, 0, count, rows);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t split = 1; split < plan.splits; ++split) fold_row(whole, plan.state_of(item * plan.splits + split), r, plan.dvp);
  write_rows(p, g, rows, count, whole, plan.dvp);
}

template <class Products, class Few>
void run_plan(const ForwardPlan<Products, Few>& plan, const Params& p, const Team& team) {
  if (plan.units == 0) return;
  if (plan.rows_apart) {
    const int64_t chunks = plan.longest / Products::kKeys;
    team.each(plan.items * chunks, [&](int64_t index, int) { pack_block(plan, p, index / chunks, index % chunks * Products::kKeys); });
  }
  attend_units(plan, p, team);
  if (plan.splits == 1) return;
  // A few rows take less time than waking a thread.
  const Team one;
  const Team& helpers = plan.units * plan.group * plan.dvp <= 16384 ? one : team;
  helpers.each(plan.items, [&](int64_t item, int) { combine(plan, p, item); });
}

template <class Products, class Few>
int64_t forward_scratch(const Params& p, const Team& team) {
  Arena count, coarse;
  const ForwardPlan<Products, Few> plan(p, team, &count);
  if (p.bias.data != nullptr) CoarseForward(p, team, &coarse);
  return most(count.used, coarse.used);
}

template <class Products, class Few>
void run_forward(const Params& p, char* scratch, const Team& team) {
  write_outside(p);
  Arena arena{scratch}, coarse{scratch};
  const ForwardPlan<Products, Few> plan(p, team, &arena);
  run_plan(plan, p, team);
  if (any_coarse(p, true)) CoarseForward(p, team, &coarse).run(p, team);
}

}  // namespace
}  // namespace cvmk::attention
