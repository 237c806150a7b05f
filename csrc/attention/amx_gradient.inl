// Blocks of the backward pass on the tiles. Probabilities and gradients of scores are held as right operands (row pairs interleaved), so
// dk and dv are gathered transposed: [key / kKeys][width][kKeys].
#pragma once
#include "attention/amx_products.inl"
#include "attention/gradient.inl"

namespace cvmk::attention {
namespace {

struct AmxGradient {
  typedef AmxProducts Products;
  // No way of its own for few keys.
  struct Few {
    static constexpr int64_t kKeys = -1;
    void take(Arena*, const Params&) {}
    void item(const Params&, const Segment&, int64_t) const {}
  };
  static constexpr int kRows = Products::kGradRows, kKeys = Products::kGradKeys, kStrip = 32;
  Half *q, *g, *q_t, *g_t;  // left operands, and transposed
  Half *p_b, *ds_b, *ds_a;  // probabilities, gradients of scores as right operands; the latter as left operand
  float *s, *dp_s, *slope;  // scores and products of a strip of rows

  TeacherBlock<Products> teacher;
  bool capped;  // whether gradients of scores include the derivative of the soft cap

  void take(Arena* arena, const Params& p, int64_t pack_keys, int64_t dp, int64_t dvp) {
    teacher.take(arena, p, kRows, kKeys, pack_keys);
    capped = true;
    q = arena->take<Half>(kRows * dp);
    g = arena->take<Half>(kRows * dvp);
    q_t = arena->take<Half>(kRows * dp);
    g_t = arena->take<Half>(kRows * dvp);
    p_b = arena->take<Half>(kRows * kKeys);
    ds_b = arena->take<Half>(kRows * kKeys);
    ds_a = arena->take<Half>(kRows * kKeys);
    s = arena->take<float>(kStrip * kKeys);
    dp_s = arena->take<float>(kStrip * kKeys);
    slope = arena->take<float>(2 * kKeys);
  }

  const Half* score_gradients() const { return ds_a; }

  void load(const Params& p, const GradRows<kRows>& block, int64_t dp, int64_t dvp) const {
    const char *rows_q[kRows], *rows_g[kRows];
    for (int64_t r = 0; r < up(block.count, 32); ++r) {
      rows_q[r] = r < block.count ? block.q[r] : nullptr;
      rows_g[r] = r < block.count ? block.g[r] : nullptr;
    }
    Products::pack_a(q, rows_q, block.count, p.dtype, p.d, dp);
    Products::pack_a(g, rows_g, block.count, p.dtype, p.dv, dvp);
    for (int64_t r = 0; r < block.count; r += 32) {
      Products::pack_at(q_t, r, kRows, rows_q + r, p.d, dp);
      Products::pack_at(g_t, r, kRows, rows_g + r, p.dv, dvp);
    }
  }

  // Rows r and r + 1 of the strip at `strip`, as pairs.
  template <bool kSpecial>
  void pair(const Params& p, const GradRow& one, const GradRow& two, int64_t r, int64_t padded, F factor, const uint32_t* columns) const {
    const __m512i mixed = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const int64_t low = one.a < one.b ? (two.a < two.b ? least(one.a, two.a) : one.a) : two.a, va = low / kLanes * kLanes;
    const int64_t vb = up(most(one.b, two.b), kLanes), local = r % kStrip;
    const float *s1 = s + local * kKeys, *s2 = s1 + kKeys, *d1 = dp_s + local * kKeys, *d2 = d1 + kKeys;
    const int64_t at = r / kStrip * (kKeys / 16) * kTile + local / 2 * 32;
    Half *left1 = ds_a + r * kKeys, *left2 = left1 + kKeys;
    const bool any = one.a < one.b || two.a < two.b;
    const float *cap1 = capped && p.softcap > 0.0f ? slope : nullptr, *cap2 = capped && p.softcap > 0.0f ? slope + kKeys : nullptr;
    for (int64_t v = 0; v < padded; v += kLanes) {
      Half *to_p = p_b + at + v / 16 * kTile, *to_ds = ds_b + at + v / 16 * kTile;
      if (!any || v < va || v >= vb) {
        _mm512_storeu_si512(to_p, _mm512_setzero_si512());
        _mm512_storeu_si512(to_ds, _mm512_setzero_si512());
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(left1 + v), _mm256_setzero_si256());
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(left2 + v), _mm256_setzero_si256());
        continue;
      }
      F p1, p2, g1, g2;
      grad_vector<false, kSpecial>(p, one, v, simd::load(s1 + v), simd::load(d1 + v), factor, cap1, columns, &p1, &g1);
      grad_vector<false, kSpecial>(p, two, v, simd::load(s2 + v), simd::load(d2 + v), factor, cap2, columns, &p2, &g2);
      const __m512i probs = simd::bits<__m512i>(_mm512_cvtne2ps_pbh(simd::bits<__m512>(p2), simd::bits<__m512>(p1)));
      const __m512i grads = simd::bits<__m512i>(_mm512_cvtne2ps_pbh(simd::bits<__m512>(g2), simd::bits<__m512>(g1)));
      _mm512_storeu_si512(to_p, _mm512_permutexvar_epi16(mixed, probs));
      _mm512_storeu_si512(to_ds, _mm512_permutexvar_epi16(mixed, grads));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(left1 + v), _mm512_castsi512_si256(grads));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(left2 + v), _mm512_extracti64x4_epi64(grads, 1));
    }
  }

  // p_b, ds_b and ds_a for keys [j, j + n).
  void scores(const Params& p, const Segment& seg, const GradRows<kRows>& block, int64_t j, int64_t n, const KeyPacks<Half>& keys, int64_t dp, int64_t dvp) const {
    const bool special = special_scores(p);
    const F factor = simd::set(special ? 1.0f : p.scale * kLog2E);
    const int64_t padded = up(n, 32);
    uint32_t columns[kKeys];
    column_hashes(p, seg.k0 + j, n, columns);
    const bool pulled = p.teacher.grad_kl.data != nullptr;
    for (int64_t strip = 0; strip < block.count; strip += kStrip) {
      GradRow rows[kStrip];
      bool any = false;
      for (int64_t r = 0; r < kStrip; ++r) {
        rows[r] = strip + r < block.count ? grad_row(block, strip + r, j, n) : GradRow{0, 0, 0.0f, 0.0f, 0.0f, 0, nullptr, 0.0f};
        if (pulled) rows[r].target = teacher.target + r * kKeys;
        any = any || rows[r].a < rows[r].b;
      }
      if (any) {
        Products::scores(q + strip * dp, kStrip, keys.k_t, j - keys.base, n, dp, s, kKeys);
        Products::scores(g + strip * dvp, kStrip, keys.v_t, j - keys.base, n, dvp, dp_s, kKeys);
        if (pulled) teacher.make_target(p, block.rows, strip, least(kStrip, block.count - strip), j, n);
      }
      for (int64_t r = 0; r < kStrip; r += 2) {
        for (int64_t k = r; special && k < r + 2; ++k)
          if (rows[k].a < rows[k].b) finish_scores(p, seg, block.rows[strip + k], j, rows[k].a, rows[k].b, s + k * kKeys, slope + (k - r) * kKeys);
        if (special || pulled || p.dropout_limit != 0)
          pair<true>(p, rows[r], rows[r + 1], strip + r, padded, factor, columns);
        else
          pair<false>(p, rows[r], rows[r + 1], strip + r, padded, factor, columns);
      }
    }
  }

  void block(const Params& p, const Segment& seg, const GradRows<kRows>& rows, int64_t j, int64_t n, const KeyPacks<Half>& keys, const GradSums& sums, int64_t dp,
             int64_t dvp, bool first) const {
    scores(p, seg, rows, j, n, keys, dp, dvp);
    const int64_t count = up(rows.count, 32), padded = up(n, 32), at = j - sums.base;
    if (sums.dq != nullptr) {
      const Tiles left{ds_a, 32, 16 * kKeys, kKeys * 2}, right{keys.k_b + (j - keys.base) * dp, 32 * dp, kTile, 64};
      multiply_tiles(count, dp, padded / 32, left, right, sums.dq, dp, !first);
    }
    constexpr int64_t kDeep = kRows / 32 * kTile, kWide = kKeys / 16 * kTile;
    if (sums.dv != nullptr) multiply_tiles(dvp, padded, count / 32, Tiles{g_t, kTile, kDeep, 64}, Tiles{p_b, kWide, kTile, 64}, sums.dv + at * dvp, kKeys, true);
    if (sums.dk != nullptr) multiply_tiles(dp, padded, count / 32, Tiles{q_t, kTile, kDeep, 64}, Tiles{ds_b, kWide, kTile, 64}, sums.dk + at * dp, kKeys, true);
  }

  static int64_t sum_size(int64_t keys, int64_t width) { return up(keys, kKeys) * width; }

  static void clear(float* sum, int64_t keys, int64_t width) {
    for (int64_t j = 0; j < keys; j += kKeys)
      for (int64_t i = 0; i < width; ++i)
        for (int64_t k = 0; k < least(keys - j, kKeys); k += 32) {
          simd::store(sum + j * width + i * kKeys + k, F{});
          simd::store(sum + j * width + i * kKeys + k + kLanes, F{});
        }
  }

  static void write(const Matrix& m, const Params&, const Segment& seg, int64_t kv_head, const float* sum, int64_t base, int64_t from, int64_t to, int64_t n,
                    int64_t width, float factor) {
    for (int64_t j = from / 16 * 16; j < to; j += 16) {
      const float* block = sum + (j - base) / kKeys * kKeys * width + (j - base) % kKeys;
      for (int64_t i = 0; i < n; i += 16) {
        __m512i x[16];
        for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_si512(block + (i + r) * kKeys);
        transpose16(x);
        const __mmask16 columns = static_cast<__mmask16>((1u << least(16, n - i)) - 1u);
        for (int64_t r = most(0, from - j); r < least(16, to - j); ++r) {
          const __m512 line = _mm512_mul_ps(_mm512_castsi512_ps(x[r]), _mm512_set1_ps(factor));
          _mm256_mask_storeu_epi16(row_of_mutable(m, 2, seg.b, kv_head, seg.k0 + j + r) + i * 2, columns, simd::bits<__m256i>(_mm512_cvtneps_pbh(line)));
        }
      }
    }
  }
};

}  // namespace
}  // namespace cvmk::attention
