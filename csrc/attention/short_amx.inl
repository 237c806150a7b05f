// Few keys on the tiles: the scores of a block of rows, their softmax to bfloat16 where they lie, the weighted values.
#pragma once
#include "attention/amx_engine.inl"
#include "attention/short.inl"

namespace {

template <int V>
__attribute__((noinline, unused)) void short_softmax_rows(const Params& p, ShortRows* s, int64_t visible, float* scores, int64_t ld) {
  const float c = p.scale * kLog2E;
  I mask[V];
  short_mask<V>(0, visible, mask);
  for (int64_t r = 0; r < s->count; ++r) {
    float* row = scores + r * ld;
    F x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = simd::load(row + v * kLanes);
    if (!s->same) short_mask<V>(s->lo[r], s->hi[r], mask);
    short_softmax<false, V>(x, mask, c, s->top + r, s->total + r);
    s->factor[r] = p.keep_factor / s->total[r];
#pragma GCC unroll 2
    for (int v = 0; v < V; v += 2) store_pair<true>(nullptr, reinterpret_cast<uint16_t*>(row) + v * kLanes, x[v], x[v + 1]);
  }
}

struct ShortAmx {
  typedef AmxEngine Engine;
  static constexpr int64_t kKeys = 64;
  Half *a, *t, *b;       // queries, keys and values as operands
  float *scores, *out;   // [kShortRows][kKeys], [kShortRows][dv padded]

  void take(Arena* arena, const Params& p) {
    const int64_t dp = Engine::padded(p.d), dvp = Engine::padded(p.dv);
    a = arena->take<Half>(kShortRows * dp);
    t = arena->take<Half>(kKeys * dp);
    b = arena->take<Half>(kKeys * dvp);
    scores = arena->take<float>(kShortRows * kKeys);
    out = arena->take<float>(kShortRows * dvp);
  }

  void load_keys(const Params& p, const Segment& g, int64_t kv_head) const {
    const int64_t dp = Engine::padded(p.d), dvp = Engine::padded(p.dv);
    const char* rows[Engine::kGroup];
    for (int64_t j = 0; j < g.visible; j += Engine::kGroup) {
      row_pointers(p.k, 2, g.b, kv_head, g.k0, j, g.visible, Engine::kGroup, rows);
      Engine::pack_t(t, j, rows, p.dtype, p.d, dp);
      row_pointers(p.v, 2, g.b, kv_head, g.k0, j, g.visible, Engine::kGroup, rows);
      Engine::pack_b(b, j, rows, p.dtype, p.dv, dvp);
    }
  }

  void attend(const Params& p, const Segment& g, ShortRows* s) const {
    const int64_t dp = Engine::padded(p.d), dvp = Engine::padded(p.dv);
    Engine::pack_a(a, s->q, s->count, p.dtype, p.d, dp);
    Engine::scores(a, s->count, t, 0, g.visible, dp, scores, kKeys);
    if (g.visible > 32)
      short_softmax_rows<4>(p, s, g.visible, scores, kKeys);
    else
      short_softmax_rows<2>(p, s, g.visible, scores, kKeys);
    Engine::weigh(scores, kKeys, s->count, b, 0, g.visible, dvp, out, false);
    short_statistics(s);
    for (int64_t r = 0; r < s->count; ++r) {
      const F factor = simd::set(s->factor[r]);
      for (int64_t i = 0; i < p.dv; i += kLanes) store_any(s->out[r], cvmk::attention::kBFloat16, i, simd::load(out + r * dvp + i) * factor, p.dv - i);
    }
    short_empty(p, *s);
  }
};

}  // namespace
