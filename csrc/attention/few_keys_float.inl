// Few keys in float32: a few rows at a time, their scores, softmax and weighted values in registers.
#pragma once
#include "attention/float_products.inl"
#include "attention/few_keys.inl"

namespace cvmk::attention {
namespace {

// sum[r] = row r of R, `depth` numbers each, times a transposed right operand of V vectors.
template <int R, int V>
CVMK_INLINE void few_product(const float* const* rows, int64_t depth, const float* t, F (*sum)[V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = F{};
  for (int64_t k = 0; k < depth; ++k) {
    F right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = simd::load(t + k * FloatProducts::kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F left = simd::set(rows[r][k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
}

// Probabilities of R rows over V vectors of keys.
template <int R, int V>
CVMK_INLINE void few_probabilities(const Params& p, FewRows* s, int64_t r0, const float* const* q, const float* t, int64_t visible, float* probs) {
  F sum[R][V];
  few_product<R, V>(q + r0, p.d, t, sum);
  I mask[V];
  few_mask<V>(0, visible, mask);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (!s->same) few_mask<V>(s->lo[r0 + r], s->hi[r0 + r], mask);
    few_softmax<true, V>(sum[r], mask, p.scale * kLog2E, s->top + r0 + r, s->total + r0 + r);
    s->factor[r0 + r] = p.keep_factor / s->total[r0 + r];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) simd::store(probs + r * FloatProducts::kPanel + v * kLanes, sum[r][v]);
  }
}

// Columns [i, i + C vectors) of R results of n numbers: weights of the keys times rows of b, times a factor each.
template <int R, int C>
CVMK_INLINE void few_values(const float* weights, int64_t keys, const float* b, int64_t i, int64_t n, const float* factor, char* const* out, Dtype dtype) {
  const int64_t width = up(n, kLanes);
  F sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = F{};
  for (int64_t k = 0; k < keys; ++k) {
    F right[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) right[c] = simd::load(b + k * width + i + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F left = simd::set(weights[r * FloatProducts::kPanel + k]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += left * right[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) elements::store_n(out[r], dtype, i + c * kLanes, sum[r][c] * factor[r], static_cast<int>(least(kLanes, n - i - c * kLanes)));
}

template <int R, int C>
CVMK_INLINE void few_results(const float* weights, int64_t keys, const float* b, int64_t n, const float* factor, char* const* out, Dtype dtype) {
  int64_t i = 0;
  for (; i + (C - 1) * kLanes < n; i += C * kLanes) few_values<R, C>(weights, keys, b, i, n, factor, out, dtype);
  for (; i < n; i += kLanes) few_values<R, 1>(weights, keys, b, i, n, factor, out, dtype);
}

template <int R, int V, int C>
__attribute__((noinline)) void few_block(const Params& p, FewRows* s, int64_t r0, const float* const* q, const float* t, const float* b, int64_t visible) {
  alignas(64) float probs[R * FloatProducts::kPanel];
  few_probabilities<R, V>(p, s, r0, q, t, visible, probs);
  few_results<R, C>(probs, visible, b, p.dv, s->factor + r0, s->out + r0, p.dtype);
}

// Blocks of R rows; the last one reaches back over rows that are done, and makes them again.
template <int R, int V, int C>
void few_blocks(const Params& p, FewRows* s, const float* const* q, const float* t, const float* b, int64_t visible) {
  for (int64_t r = 0; r < s->count; r += R) few_block<R, V, C>(p, s, least(r, s->count - R), q, t, b, visible);
}

template <int V>
void few_blocks(const Params& p, FewRows* s, const float* const* q, const float* t, const float* b, int64_t visible) {
  constexpr int kMany = V <= 2 ? 8 : 6, kWide = V <= 2 ? 2 : 4;
  if (s->count >= kMany) return few_blocks<kMany, V, kWide>(p, s, q, t, b, visible);
  if (s->count >= 3) return few_blocks<3, V, kWide>(p, s, q, t, b, visible);
  few_blocks<1, V, kWide>(p, s, q, t, b, visible);
}

struct FewFloat {
  static constexpr int64_t kKeys = FloatProducts::kPanel;
  float *t, *b, *q;  // keys as [d][kKeys], values as [keys][dv padded], queries where they are not floats

  void take(Arena* arena, const Params& p) {
    t = arena->take<float>(FloatProducts::t_size(up(kKeys, FloatProducts::kGroup), up(p.d, kLanes)));
    b = arena->take<float>(kKeys * up(p.dv, kLanes));
    q = arena->take<float>(p.dtype == kFloat32 ? 0 : kFewRows * up(p.d, kLanes));
  }

  void load_keys(const Params& p, const Segment& g, int64_t kv_head) const {
    const int64_t width = size_of(p.dtype), padded = up(p.dv, kLanes);
    const char* rows[FloatProducts::kGroup];
    for (int64_t j = 0; j < g.visible; j += FloatProducts::kGroup) {
      row_pointers(p.k, width, g.b, kv_head, g.k0, j, g.visible, FloatProducts::kGroup, rows);
      FloatProducts::pack_t(t, j, rows, p.dtype, p.d, up(p.d, kLanes));
    }
    for (int64_t j = 0; j < g.visible; ++j) elements::to_floats(b + j * padded, row_of(p.v, width, g.b, kv_head, g.k0 + j), p.dtype, p.dv, padded);
  }

  void attend(const Params& p, const Segment& g, FewRows* s) const {
    const float* rows[kFewRows];
    const int64_t width = up(p.d, kLanes);
    for (int64_t r = 0; r < s->count; ++r) {
      rows[r] = p.dtype == kFloat32 ? reinterpret_cast<const float*>(s->q[r]) : q + r * width;
      if (p.dtype != kFloat32) elements::to_floats(q + r * width, s->q[r], p.dtype, p.d, width);
    }
    switch ((g.visible + kLanes - 1) / kLanes) {
#if defined(__AVX512F__)
      case 4: few_blocks<4>(p, s, rows, t, b, g.visible); break;
      case 3: few_blocks<3>(p, s, rows, t, b, g.visible); break;
#endif
      case 2: few_blocks<2>(p, s, rows, t, b, g.visible); break;
      default: few_blocks<1>(p, s, rows, t, b, g.visible); break;
    }
    few_statistics(s);
    few_empty(p, *s);
  }
};

}  // namespace
}  // namespace cvmk::attention
