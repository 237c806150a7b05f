// The gradient of the bias: gradients of scores summed over the dimensions in which the bias was broadcast, in a fixed order. A unit of
// work owns some rows of the bias and goes through everything that they were broadcast to, so scores are computed once more. A bias that is
// broadcast over the keys does not come here: it shifts the scores of a row, and its gradient is that of the log-sum-exp.
#pragma once
#include "attention/backward.inl"

namespace {

CVMK_INLINE float score_gradient(const float* ds, int64_t i) { return ds[i]; }
CVMK_INLINE float score_gradient(const uint16_t* ds, int64_t i) { return simd::bits<float>(static_cast<uint32_t>(ds[i]) << 16); }

inline void write_bias(const Bias& bias, int64_t first, const float* sums, int64_t n) {
  char* to = static_cast<char*>(bias.grad) + first * width_of(bias.dtype);
  if (bias.dtype != cvmk::attention::kFloat64) return from_floats(to, bias.dtype, sums, 1.0f, n);
  for (int64_t j = 0; j < n; ++j) {
    const double x = sums[j];
    memcpy(to + j * 8, &x, 8);
  }
}

// One head of one segment into the sums [rows of the unit or 1][keys]; the unit's rows are [i0, i1) of the tensor.
template <class Gradient>
void bias_head(const Params& p, const Segment& g, int64_t head, int64_t i0, int64_t i1, BackwardScratch<Gradient>& w, float* sums) {
  typedef typename Gradient::Engine Engine;
  const int64_t dp = Engine::padded(p.d), dvp = Engine::padded(p.dv), group = p.heads / p.kv_heads, kv_head = head / group;
  const bool all_rows = p.bias.size[2] == 1;
  const int64_t start = head % group * g.rows;
  const int64_t begin = most(0, least(i0 - g.q0, g.rows)), end = most(begin, least(i1 - g.q0, g.rows));
  KeyPacks<typename Engine::Element> packs = w.packs;
  for (int64_t r = begin; r < end; r += Gradient::kRows) {
    load_rows(p, g, kv_head, start + r, least(Gradient::kRows, end - r), w.rows);
    if (w.rows->lo < w.rows->hi) w.gradient.load(p, *w.rows, dp, dvp);
    for (int64_t j = w.rows->lo / Gradient::kKeys * Gradient::kKeys; j < w.rows->hi; j += Gradient::kKeys) {
      const int64_t n = least(Gradient::kKeys, w.rows->hi - j);
      packs.base = j;
      pack_grad_keys<Gradient>(p, g, kv_head, j, j + n, packs);
      w.gradient.scores(p, g, *w.rows, j, n, packs, dp, dvp);
      for (int64_t i = 0; i < w.rows->count; ++i) {
        float* row = sums + (all_rows ? 0 : g.q0 + r + i - i0) * p.keys + g.k0 + j;
        const auto* ds = w.gradient.score_gradients() + i * Gradient::kKeys;
        for (int64_t k = 0; k < n; ++k) row[k] += score_gradient(ds, k);
      }
    }
  }
}

template <class Gradient>
int bias_grad(const Params& p) {
  typedef typename Gradient::Engine Engine;
  const Bias& bias = p.bias;
  const int64_t dp = Engine::padded(p.d), dvp = Engine::padded(p.dv);
  const bool all_rows = bias.size[2] == 1;
  const int64_t keys = p.keys, blocks = all_rows ? 1 : (p.rows + Gradient::kRows - 1) / Gradient::kRows;
  const int64_t units = bias.size[0] * bias.size[1] * blocks, workers = least(most(units, 1), threads::limit());
  Arena arena{nullptr, 0};
  const BackwardScratch<Gradient> sizes(&arena, p, Gradient::kKeys, 0, dp, dvp);
  const int64_t sum_size = (all_rows ? 1 : Gradient::kRows) * keys;
  arena.take<float>(sum_size);
  const int64_t bytes = up(arena.used, 4096);
  char* memory = allocate(bytes * workers);
  if (memory == nullptr) return cvmk::attention::kNoMemory;
  threads::each(units, [&](int64_t unit) {
    Arena own{memory + bytes * threads::index(), 0};
    BackwardScratch<Gradient> w(&own, p, Gradient::kKeys, 0, dp, dvp);
    w.gradient.capped = false;
    float* sums = own.take<float>(sum_size);
    memset(sums, 0, static_cast<size_t>(sum_size) * sizeof(float));
    const int64_t b = unit / (bias.size[1] * blocks), h = unit / blocks % bias.size[1];
    const int64_t i0 = all_rows ? 0 : unit % blocks * Gradient::kRows, i1 = all_rows ? p.rows : least(i0 + Gradient::kRows, p.rows);
    Engine::begin();
    for (int64_t s = 0; s < segments(p); ++s) {
      if (p.sequences < 0 && bias.size[0] != 1 && s != b) continue;
      const Segment g = segment(p, s);
      for (int64_t head = 0; head < p.heads; ++head)
        if (bias.size[1] == 1 || head == h) bias_head<Gradient>(p, g, head, i0, i1, w, sums);
    }
    Engine::end();
    for (int64_t i = 0; i < (all_rows ? 1 : i1 - i0); ++i)
      write_bias(bias, ((b * bias.size[1] + h) * bias.size[2] + (all_rows ? 0 : i0 + i)) * bias.size[3], sums + i * keys, keys);
  });
  free(memory);
  return cvmk::attention::kDone;
}

}  // namespace
