// The gradient of the bias: gradients of scores summed over the dimensions in which the bias was broadcast, in a fixed order. A unit of
// work owns some rows of the bias and goes through everything that they were broadcast to, so scores are computed once more. A bias that is
// broadcast over the keys does not come here: it shifts the scores of a row, and its gradient is that of the log-sum-exp.
#pragma once
#include "attention/backward.inl"
#include "attention/coarse_gradient.inl"

namespace cvmk::attention {
namespace {

CVMK_INLINE float score_gradient(const float* ds, int64_t i) { return ds[i]; }
CVMK_INLINE float score_gradient(const uint16_t* ds, int64_t i) { return simd::bits<float>(static_cast<uint32_t>(ds[i]) << 16); }

// Rows [first, last) of one head of one segment into the sums [rows or 1][stride], those of row `first` and of key 0 of the segment first.
template <class Gradient>
void bias_head(const Params& p, const Segment& g, int64_t head, int64_t first, int64_t last, BackwardScratch<Gradient>& w, float* sums, int64_t stride) {
  typedef typename Gradient::Products Products;
  const int64_t dp = Products::padded(p.d), dvp = Products::padded(p.dv), group = p.heads / p.kv_heads, kv_head = head / group;
  const int64_t start = head % group * g.rows;
  KeyPacks<typename Products::Element> packs = w.packs;
  for (int64_t r = first; r < last; r += Gradient::kRows) {
    load_rows(p, g, kv_head, start + r, least(Gradient::kRows, last - r), w.rows);
    if (w.rows->lo < w.rows->hi) w.gradient.load(p, *w.rows, dp, dvp);
    for (int64_t j = w.rows->lo / Gradient::kKeys * Gradient::kKeys; j < w.rows->hi; j += Gradient::kKeys) {
      const int64_t n = least(Gradient::kKeys, w.rows->hi - j);
      packs.base = j;
      pack_grad_keys<Gradient>(p, g, kv_head, j, j + n, packs);
      w.gradient.scores(p, g, *w.rows, j, n, packs, dp, dvp);
      for (int64_t i = 0; i < w.rows->count; ++i) {
        float* row = sums + (r + i - first) * stride + j;
        const auto* ds = w.gradient.score_gradients() + i * Gradient::kKeys;
        for (int64_t k = 0; k < n; ++k) row[k] += score_gradient(ds, k);
      }
    }
  }
}

template <class Gradient>
struct BiasGradient {
  typedef typename Gradient::Products Products;
  bool all_rows;  // the bias has one row for all
  int64_t dp, dvp, keys, blocks, units, sum_size, own_bytes;
  char* own;
  const CoarseRow* coarse = nullptr;  // statistics of coarse rows, where there are some

  BiasGradient(const Params& p, const Team& team, Arena* arena)
      : all_rows(p.bias.size[2] == 1), dp(Products::padded(p.d)), dvp(Products::padded(p.dv)), keys(p.keys), blocks(all_rows ? 1 : pieces(p.rows, Gradient::kRows)),
        units(p.bias.size[0] * p.bias.size[1] * blocks), sum_size((all_rows ? 1 : Gradient::kRows) * p.keys) {
    Arena one;
    BackwardScratch<Gradient>(&one, p, Gradient::kKeys, 0, dp, dvp);
    one.take<float>(sum_size);
    CoarseScratch(&one, p);
    own_bytes = up(one.used, 4096);
    own = arena->take<char>(own_bytes * least(most(units, 1), team.size));
  }

  void run(const Params& p, const Team& team) const {
    team.each(units, [&](int64_t unit, int thread) {
      Arena arena{own + own_bytes * thread};
      BackwardScratch<Gradient> w(&arena, p, Gradient::kKeys, 0, dp, dvp);
      w.gradient.capped = false;
      float* sums = arena.take<float>(sum_size);
      memset(sums, 0, static_cast<size_t>(sum_size) * sizeof(float));
      one_unit(p, unit, w, sums, CoarseScratch(&arena, p));
    });
  }

  void one_unit(const Params& p, int64_t unit, BackwardScratch<Gradient>& w, float* sums, const CoarseScratch& wide) const {
    const Bias& bias = p.bias;
    const int64_t b = unit / (bias.size[1] * blocks), h = unit / blocks % bias.size[1];
    const int64_t i0 = all_rows ? 0 : unit % blocks * Gradient::kRows, i1 = all_rows ? p.rows : least(i0 + Gradient::kRows, p.rows);
    Products::begin();
    for (int64_t s = 0; s < segments(p); ++s) {
      if (p.sequences < 0 && bias.size[0] != 1 && s != b) continue;
      const Segment g = segment(p, s);
      const int64_t first = most(0, least(i0 - g.q0, g.rows)), last = most(first, least(i1 - g.q0, g.rows));
      for (int64_t head = 0; head < p.heads; ++head) {
        if (bias.size[1] != 1 && head != h) continue;
        float* to = sums + (all_rows ? 0 : g.q0 + first - i0) * keys + g.k0;
        bias_head<Gradient>(p, g, head, first, last, w, to, all_rows ? 0 : keys);
        if (coarse != nullptr) CoarseGradient::add_bias(p, g, head, first, last, coarse, wide, to, all_rows ? 0 : keys);
      }
    }
    Products::end();
    for (int64_t i = 0; i < (all_rows ? 1 : i1 - i0); ++i)
      elements::from_floats(elements::at(bias.grad, bias.dtype, ((b * bias.size[1] + h) * bias.size[2] + (all_rows ? 0 : i0 + i)) * bias.size[3]), bias.dtype, sums + i * keys, 1.0f, keys);
  }
};

// -- the whole backward pass: its parts one after the other, in the same memory --------------------------------------------------------------
template <class Part>
int64_t part_scratch(const Params& p, const Team& team) {
  Arena count;
  const Part part(p, team, &count);
  return count.used;
}

template <class Part>
void run_part(const Params& p, char* scratch, const Team& team) {
  Arena arena{scratch};
  const Part part(p, team, &arena);
  part.run(p, team);
}

// Statistics of coarse rows come first in the scratch memory, in pages of their own, and the parts share the rest.
inline int64_t statistics_bytes(const Params& p) {
  return p.bias.data == nullptr ? 0 : up(p.batch * p.heads * p.rows * static_cast<int64_t>(sizeof(CoarseRow)), 4096);
}

template <class Gradient, class Few>
int64_t backward_scratch(const Params& p, const Team& team) {
  const BackwardPlan<Gradient, Few> plan(p, team);
  int64_t bytes = 0;
  if (plan.few) bytes = most(bytes, part_scratch<FewItems<Few>>(p, team));
  if (plan.whole) bytes = most(bytes, part_scratch<WholeItems<Gradient, Few>>(p, team));
  if (plan.in_pieces) bytes = most(bytes, part_scratch<ItemPieces<Gradient, Few>>(p, team));
  if (p.bias.data == nullptr) return bytes;
  if (p.bias.grad != nullptr) bytes = most(bytes, part_scratch<BiasGradient<Gradient>>(p, team));
  Arena coarse;
  CoarseGradient(p, team, nullptr, &coarse);
  return statistics_bytes(p) + most(bytes, coarse.used);
}

template <class Gradient, class Few>
void run_backward(const Params& p, char* scratch, const Team& team) {
  const BackwardPlan<Gradient, Few> plan(p, team);
  CoarseRow* statistics = reinterpret_cast<CoarseRow*>(scratch);
  char* rest = scratch + statistics_bytes(p);
  if (plan.few) run_part<FewItems<Few>>(p, rest, team);
  if (plan.whole) run_part<WholeItems<Gradient, Few>>(p, rest, team);
  if (plan.in_pieces) run_part<ItemPieces<Gradient, Few>>(p, rest, team);
  const bool coarse = any_coarse(p, false);
  if (coarse) {
    Arena arena{rest};
    CoarseGradient(p, team, statistics, &arena).run(p, team);
  }
  if (p.bias.grad != nullptr) {
    Arena arena{rest};
    BiasGradient<Gradient> part(p, team, &arena);
    part.coarse = coarse ? statistics : nullptr;
    part.run(p, team);
  }
}

}  // namespace
}  // namespace cvmk::attention
