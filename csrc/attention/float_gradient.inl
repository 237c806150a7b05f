// Blocks of the backward pass in float32. dk and dv are gathered as [key][width].
#pragma once
#include "attention/float_products.inl"
#include "attention/gradient.inl"

namespace cvmk::attention {
namespace {

struct FloatGradient {
  typedef FloatProducts Products;
  static constexpr int kRows = Products::kGradRows, kKeys = Products::kGradKeys;
  float *q, *g, *s, *ds, *slope;
  TeacherBlock<Products> teacher;

  bool capped;  // whether gradients of scores include the derivative of the soft cap

  void take(Arena* arena, const Params& p, int64_t pack_keys, int64_t dp, int64_t dvp) {
    teacher.take(arena, p, kRows, kKeys, pack_keys);
    capped = true;
    q = arena->take<float>(kRows * dp);
    g = arena->take<float>(kRows * dvp);
    s = arena->take<float>(kRows * kKeys);
    ds = arena->take<float>(kRows * kKeys);
    slope = arena->take<float>(kKeys);
  }

  const float* score_gradients() const { return ds; }

  void load(const Params& p, const GradRows<kRows>& block, int64_t dp, int64_t dvp) const {
    Products::pack_a(q, block.q, block.count, p.dtype, p.d, dp);
    if (p.grad_out.data != nullptr)
      Products::pack_a(g, block.g, block.count, p.dtype, p.dv, dvp);
    else
      memset(g, 0, static_cast<size_t>(block.count * dvp) * sizeof(float));
  }

  // Probabilities to s, gradients of scores to ds, for keys [j, j + n).
  void scores(const Params& p, const Segment& seg, const GradRows<kRows>& block, int64_t j, int64_t n, const KeyPacks<float>& keys, int64_t dp, int64_t dvp) const {
    const bool special = special_scores(p);
    const F factor = simd::set(special ? 1.0f : p.scale * kLog2E);
    const int64_t padded = up(n, kLanes);
    uint32_t columns[kKeys];
    column_hashes(p, seg.k0 + j, n, columns);
    Products::scores(q, block.count, keys.k_t, j - keys.base, n, dp, s, kKeys);
    Products::scores(g, block.count, keys.v_t, j - keys.base, n, dvp, ds, kKeys);
    const bool pulled = p.teacher.grad_kl.data != nullptr;
    if (pulled) teacher.make_target(p, block.rows, 0, block.count, j, n);
    for (int64_t r = 0; r < block.count; ++r) {
      GradRow row = grad_row(block, r, j, n);
      if (pulled) row.target = teacher.target + r * kKeys;
      float *x = s + r * kKeys, *y = ds + r * kKeys;
      const float* cap = capped && p.softcap > 0.0f ? slope : nullptr;
      if (special && row.a < row.b) finish_scores(p, seg, block.rows[r], j, row.a, row.b, x, slope);
      const int64_t va = row.a < row.b ? row.a / kLanes * kLanes : padded, vb = row.a < row.b ? up(row.b, kLanes) : padded;
      for (int64_t v = 0; v < va; v += kLanes) {
        simd::store(x + v, F{});
        simd::store(y + v, F{});
      }
      if (special || pulled || p.dropout_limit != 0)
        row_gradients<true>(p, row, va, vb, factor, cap, columns, x, y);
      else
        row_gradients<false>(p, row, va, vb, factor, cap, columns, x, y);
      for (int64_t v = vb; v < padded; v += kLanes) {
        simd::store(x + v, F{});
        simd::store(y + v, F{});
      }
    }
  }

  template <bool kSpecial>
  static void row_gradients(const Params& p, const GradRow& row, int64_t va, int64_t vb, F factor, const float* cap, const uint32_t* columns, float* x, float* y) {
    for (int64_t v = va; v < vb; v += kLanes) {
      F prob, grad;
      grad_vector<true, kSpecial>(p, row, v, simd::load(x + v), simd::load(y + v), factor, cap, columns, &prob, &grad);
      simd::store(x + v, prob);
      simd::store(y + v, grad);
    }
  }

  void block(const Params& p, const Segment& seg, const GradRows<kRows>& rows, int64_t j, int64_t n, const KeyPacks<float>& keys, const GradSums& sums, int64_t dp,
             int64_t dvp, bool first) const {
    scores(p, seg, rows, j, n, keys, dp, dvp);
    if (sums.dq != nullptr) Products::weigh(ds, kKeys, rows.count, keys.k_b, j - keys.base, n, dp, sums.dq, !first);
    constexpr int64_t panel = Products::kPanel;
    if (sums.dv != nullptr) multiply(n, dvp, rows.count, s, 1, kKeys, g, panel, dvp, sums.dv + (j - sums.base) * dvp, dvp, true);
    if (sums.dk != nullptr) multiply(n, dp, rows.count, ds, 1, kKeys, q, panel, dp, sums.dk + (j - sums.base) * dp, dp, true);
  }

  // Elements of a sum over `keys` keys.
  static int64_t sum_size(int64_t keys, int64_t width) { return up(keys, kKeys) * width; }

  static void clear(float* sum, int64_t keys, int64_t width) { memset(sum, 0, static_cast<size_t>(keys * width) * sizeof(float)); }

  // Rows of a gradient from the sum of keys [from, to), which begins at key `base`.
  static void write(const Matrix& m, const Params& p, const Segment& seg, int64_t kv_head, const float* sum, int64_t base, int64_t from, int64_t to, int64_t n,
                    int64_t width, float factor) {
    const int64_t size = size_of(p.dtype);
    for (int64_t j = from; j < to; ++j) elements::from_floats(row_of_mutable(m, size, seg.b, kv_head, seg.k0 + j), p.dtype, sum + (j - base) * width, factor, n);
  }
};

}  // namespace
}  // namespace cvmk::attention
