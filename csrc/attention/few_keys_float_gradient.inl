// The backward pass over few keys in float32. A few rows at a time: probabilities, gradients of scores and of the queries in registers;
// then, from a block of rows of one head, what keys and values get.
#pragma once
#include "attention/float_gradient.inl"
#include "attention/few_keys_float.inl"

namespace cvmk::attention {
namespace {

struct FewFloatGradient {
  static constexpr int64_t kKeys = FloatProducts::kPanel;
  float *k_t, *v_t, *k_b;          // keys and values as [d][kKeys], keys as [keys][d padded]
  float *q, *g;                    // rows as floats, where they do not lie so
  float *probs, *ds, *dk, *dv;     // [kFewRows][kKeys]; [keys][padded]

  // A block of rows of one head, as floats `stride` apart, and what they need of the forward pass.
  struct Rows {
    int64_t count, i;
    bool same;
    const float *q[kFewRows], *g[kFewRows];
    char* dq[kFewRows];
    float lse[kFewRows], low[kFewRows], delta[kFewRows], factor[kFewRows];
  };

  void take(Arena* arena, const Params& p) {
    const int64_t dp = up(p.d, kLanes), dvp = up(p.dv, kLanes), keys = up(kKeys, FloatProducts::kGroup);
    k_t = arena->take<float>(FloatProducts::t_size(keys, dp));
    v_t = arena->take<float>(FloatProducts::t_size(keys, dvp));
    k_b = arena->take<float>(kKeys * dp);
    q = arena->take<float>(kFewRows * dp);
    g = arena->take<float>(kFewRows * dvp);
    probs = arena->take<float>(kFewRows * kKeys);
    ds = arena->take<float>(kFewRows * kKeys);
    dk = arena->take<float>(kKeys * dp);
    dv = arena->take<float>(kKeys * dvp);
  }

  void load_keys(const Params& p, const Segment& seg, int64_t kv_head) const {
    const int64_t width = size_of(p.dtype), dp = up(p.d, kLanes), dvp = up(p.dv, kLanes);
    const char* rows[FloatProducts::kGroup];
    for (int64_t j = 0; j < seg.visible; j += FloatProducts::kGroup) {
      row_pointers(p.k, width, seg.b, kv_head, seg.k0, j, seg.visible, FloatProducts::kGroup, rows);
      FloatProducts::pack_t(k_t, j, rows, p.dtype, p.d, dp);
      for (int64_t r = 0; r < least(FloatProducts::kGroup, seg.visible - j); ++r) elements::to_floats(k_b + (j + r) * dp, rows[r], p.dtype, p.d, dp);
      row_pointers(p.v, width, seg.b, kv_head, seg.k0, j, seg.visible, FloatProducts::kGroup, rows);
      FloatProducts::pack_t(v_t, j, rows, p.dtype, p.dv, dvp);
    }
  }

  void load_rows(const Params& p, const Segment& seg, int64_t head, int64_t first, int64_t count, Rows* rows) const {
    const int64_t width = size_of(p.dtype), dp = up(p.d, kLanes), dvp = up(p.dv, kLanes);
    rows->count = count;
    rows->i = first;
    rows->same = p.window_left < 0 && p.window_right < 0;
    const float* lse = reinterpret_cast<const float*>(row_of(p.lse, 4, seg.b, head, seg.q0 + first));
    const float* grad_lse = p.grad_lse.data == nullptr ? nullptr : reinterpret_cast<const float*>(row_of(p.grad_lse, 4, seg.b, head, seg.q0 + first));
    const char *from_q = row_of(p.q, width, seg.b, head, seg.q0 + first), *from_g = row_of(p.grad_out, width, seg.b, head, seg.q0 + first);
    const char* out = row_of(p.out, width, seg.b, head, seg.q0 + first);
    for (int64_t r = 0; r < count; ++r) {
      float *to_q = q + r * dp, *to_g = g + r * dvp;
      int64_t lo, hi;
      visible_keys(p, seg, first + r, &lo, &hi);
      const bool sees = lo < hi;  // a row that does not counts as zeros, since a NaN in it would reach dk and dv
      elements::to_floats(to_q, sees ? from_q + r * p.q.row * width : nullptr, p.dtype, p.d, dp);
      elements::to_floats(to_g, sees ? from_g + r * p.grad_out.row * width : nullptr, p.dtype, p.dv, dvp);
      rows->q[r] = to_q;
      rows->g[r] = to_g;
      rows->dq[r] = p.dq.data == nullptr ? nullptr : row_of_mutable(p.dq, width, seg.b, head, seg.q0 + first + r);
      const double wide = lse[r] == -kInf ? 0.0 : lse[r] * 1.4426950408889634;
      rows->lse[r] = static_cast<float>(wide);
      rows->low[r] = static_cast<float>(wide - rows->lse[r]);
      rows->delta[r] = dot_rows(from_g + r * p.grad_out.row * width, out + r * p.out.row * width, p.dtype, p.dv) - (grad_lse == nullptr ? 0.0f : grad_lse[r]);
      rows->factor[r] = p.scale;
    }
  }

  template <int R, int V, int C>
  __attribute__((noinline)) void some_rows(const Params& p, const Segment& seg, const Rows& rows, int64_t r0) const {
    F x[R][V], y[R][V];
    I mask[V];
    const F factor = simd::set(p.scale * kLog2E);
    float *to_probs = probs + r0 * kKeys, *to_ds = ds + r0 * kKeys;
    few_mask<V>(0, seg.visible, mask);
    few_product<R, V>(rows.q + r0, p.d, k_t, x);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (!rows.same) row_mask<V>(p, seg, rows.i + r0 + r, mask);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const F s = x[r][v] * factor - rows.lse[r0 + r];
        simd::store(to_probs + r * kKeys + v * kLanes, simd::select(mask[v], exp2<true>(s - rows.low[r0 + r]), F{}));
      }
    }
    few_product<R, V>(rows.g + r0, p.dv, v_t, y);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (!rows.same) row_mask<V>(p, seg, rows.i + r0 + r, mask);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const F grad = simd::load(to_probs + r * kKeys + v * kLanes) * (y[r][v] - rows.delta[r0 + r]);
        simd::store(to_ds + r * kKeys + v * kLanes, simd::select(mask[v], grad, F{}));
      }
    }
    if (p.dq.data != nullptr) few_results<R, C>(to_ds, seg.visible, k_b, p.d, rows.factor + r0, rows.dq + r0, p.dtype);
  }

  template <int V>
  static CVMK_INLINE void row_mask(const Params& p, const Segment& seg, int64_t i, I* mask) {
    int64_t lo, hi;
    visible_keys(p, seg, i, &lo, &hi);
    few_mask<V>(lo, hi, mask);
  }

  template <int R, int V, int C>
  void in_blocks(const Params& p, const Segment& seg, const Rows& rows) const {
    for (int64_t r = 0; r < rows.count; r += R) some_rows<R, V, C>(p, seg, rows, least(r, rows.count - R));
  }

  template <int V>
  void all_rows(const Params& p, const Segment& seg, const Rows& rows) const {
    constexpr int kMany = V <= 2 ? 8 : 6, kWide = V <= 2 ? 2 : 4;
    if (rows.count >= kMany) return in_blocks<kMany, V, kWide>(p, seg, rows);
    if (rows.count >= 3) return in_blocks<3, V, kWide>(p, seg, rows);
    in_blocks<1, V, kWide>(p, seg, rows);
  }

  // All gradients of an item.
  void item(const Params& p, const Segment& seg, int64_t kv_head) const {
    const int64_t dp = up(p.d, kLanes), dvp = up(p.dv, kLanes), group = p.heads / p.kv_heads, keys = seg.visible;
    load_keys(p, seg, kv_head);
    bool add = false;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t r = 0; r < seg.rows; r += kFewRows, add = true) {
        Rows rows;
        load_rows(p, seg, head, r, least(kFewRows, seg.rows - r), &rows);
        switch ((keys + kLanes - 1) / kLanes) {
#if defined(__AVX512F__)
          case 4: all_rows<4>(p, seg, rows); break;
          case 3: all_rows<3>(p, seg, rows); break;
#endif
          case 2: all_rows<2>(p, seg, rows); break;
          default: all_rows<1>(p, seg, rows); break;
        }
        constexpr int64_t panel = FloatProducts::kPanel;
        if (p.dv_.data != nullptr) multiply(keys, dvp, rows.count, probs, 1, kKeys, g, panel, dvp, dv, dvp, add);
        if (p.dk.data != nullptr) multiply(keys, dp, rows.count, ds, 1, kKeys, q, panel, dp, dk, dp, add);
      }
    write(p.dv_, p, seg, kv_head, add, dv, p.dv, dvp, p.keep_factor);
    write(p.dk, p, seg, kv_head, add, dk, p.d, dp, p.scale);
  }

  static void write(const Matrix& m, const Params& p, const Segment& seg, int64_t kv_head, bool any, const float* sums, int64_t n, int64_t width, float factor) {
    if (m.data == nullptr) return;
    const int64_t size = size_of(p.dtype);
    for (int64_t j = 0; j < seg.keys; ++j) {
      char* to = row_of_mutable(m, size, seg.b, kv_head, seg.k0 + j);
      if (any && j < seg.visible)
        elements::from_floats(to, p.dtype, sums + j * width, factor, n);
      else
        memset(to, 0, static_cast<size_t>(n * size));
    }
  }
};

}  // namespace
}  // namespace cvmk::attention
