// Few keys on the tiles: the scores of a block of rows, their softmax to bfloat16 where they lie, the weighted values.
#pragma once
#include "attention/amx_products.inl"
#include "attention/few_keys.inl"

namespace cvmk::attention {
namespace {

template <int V>
__attribute__((noinline, unused)) void few_softmax_rows(const Params& p, FewRows* s, int64_t visible, float* scores, int64_t ld) {
  const float c = p.scale * kLog2E;
  I mask[V];
  few_mask<V>(0, visible, mask);
  for (int64_t r = 0; r < s->count; ++r) {
    float* row = scores + r * ld;
    F x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = simd::load(row + v * kLanes);
    if (!s->same) few_mask<V>(s->lo[r], s->hi[r], mask);
    few_softmax<false, V>(x, mask, c, s->top + r, s->total + r);
    s->factor[r] = p.keep_factor / s->total[r];
#pragma GCC unroll 2
    for (int v = 0; v < V; v += 2) store_pair<true>(nullptr, reinterpret_cast<uint16_t*>(row) + v * kLanes, x[v], x[v + 1]);
  }
}

struct FewAmx {
  typedef AmxProducts Products;
  static constexpr int64_t kKeys = 64;
  Half *a, *t, *b;       // queries, keys and values as operands
  float *scores, *out;   // [kFewRows][kKeys], [kFewRows][dv padded]

  void take(Arena* arena, const Params& p) {
    const int64_t dp = Products::padded(p.d), dvp = Products::padded(p.dv);
    a = arena->take<Half>(kFewRows * dp);
    t = arena->take<Half>(kKeys * dp);
    b = arena->take<Half>(kKeys * dvp);
    scores = arena->take<float>(kFewRows * kKeys);
    out = arena->take<float>(kFewRows * dvp);
  }

  void load_keys(const Params& p, const Segment& g, int64_t kv_head) const {
    const int64_t dp = Products::padded(p.d), dvp = Products::padded(p.dv);
    const char* rows[Products::kGroup];
    for (int64_t j = 0; j < g.visible; j += Products::kGroup) {
      row_pointers(p.k, 2, g.b, kv_head, g.k0, j, g.visible, Products::kGroup, rows);
      Products::pack_t(t, j, rows, p.dtype, p.d, dp);
      row_pointers(p.v, 2, g.b, kv_head, g.k0, j, g.visible, Products::kGroup, rows);
      Products::pack_b(b, j, rows, p.dtype, p.dv, dvp);
    }
  }

  void attend(const Params& p, const Segment& g, FewRows* s) const {
    const int64_t dp = Products::padded(p.d), dvp = Products::padded(p.dv);
    Products::pack_a(a, s->q, s->count, p.dtype, p.d, dp);
    Products::scores(a, s->count, t, 0, g.visible, dp, scores, kKeys);
    if (g.visible > 32)
      few_softmax_rows<4>(p, s, g.visible, scores, kKeys);
    else
      few_softmax_rows<2>(p, s, g.visible, scores, kKeys);
    Products::weigh(scores, kKeys, s->count, b, 0, g.visible, dvp, out, false);
    few_statistics(s);
    for (int64_t r = 0; r < s->count; ++r) {
      const F factor = simd::set(s->factor[r]);
      for (int64_t i = 0; i < p.dv; i += kLanes) elements::store_n(s->out[r], kBFloat16, i, simd::load(out + r * dvp + i) * factor, static_cast<int>(least(kLanes, p.dv - i)));
    }
    few_empty(p, *s);
  }
};

}  // namespace
}  // namespace cvmk::attention
