// Products of float32 blocks on vector registers. Operands: `a` is row-major [rows][width]; `t` (a transposed right operand) is
// [key / kPanel][width][kPanel]; `b` (a right operand whose rows are keys) is [key / kKeys][width / W][kKeys][W], W = min(kPanel, width).
// Widths are padded to vectors, and everything that is padded holds zeros.
#pragma once
#include "attention/math.inl"
#include "common/float_product.inl"

namespace cvmk::attention {
namespace {

// c[m][n] (+)= a b over `depth`, a[r * am + k * ak]; n a multiple of the lanes; column panel p of b starts at b + p * bp.
inline void multiply(int64_t m, int64_t n, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b, int64_t bp, int64_t bk, float* c, int64_t ldc,
                     bool add) {
  product::multiply(m, n, depth, {a, am, ak, depth, 0}, {b, bp, bk}, c, ldc, add);
}

struct FloatProducts {
  typedef float Element;
  static constexpr bool kPrecise = true;
  static constexpr bool kTiles = false;
  static constexpr int kGroup = 32;  // rows packed at a time
  static constexpr int kRows = 96, kKeys = 128, kGradRows = 96, kGradKeys = 128;
  static constexpr int kPanel = product::kPanel;

  static void begin() {}
  static void end() {}
  static int64_t padded(int64_t width) { return up(width, kLanes); }
  static int64_t panel_of(int64_t width) { return width == 0 ? 1 : width < kPanel ? width : kPanel; }
  static int64_t key_step() { return kLanes; }
  static int64_t t_size(int64_t keys, int64_t width) { return up(keys, kPanel) * width; }
  static int64_t b_size(int64_t keys, int64_t width) { return up(keys, kKeys) * up(width, panel_of(width)); }

  // Rows j to j + 31 of the pack from 32 rows of n numbers; a null row is zeros.
  static void pack_t(float* pack, int64_t j, const char* const* rows, Dtype dtype, int64_t n, int64_t width) {
    for (int64_t first = 0; first < kGroup; first += kLanes) {
      float* dst = pack + (j + first) / kPanel * width * kPanel + (j + first) % kPanel;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int count = static_cast<int>(least(n - i, kLanes));
        float block[kLanes][kLanes] __attribute__((aligned(64)));
        for (int r = 0; r < kLanes; ++r) {
          const char* row = rows[first + r];
          simd::store(block[r], row == nullptr ? F{} : count == kLanes ? elements::load(row, dtype, i) : elements::load_n(row, dtype, i, count));
        }
#if defined(__AVX512F__)
        __m512i x[16];
        for (int r = 0; r < 16; ++r) x[r] = _mm512_load_si512(block[r]);
        transpose16(x);
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(dst + (i + r) * kPanel, x[r]);
#else
        for (int c = 0; c < kLanes; ++c)
          for (int r = 0; r < kLanes; ++r) dst[(i + c) * kPanel + r] = block[r][c];
#endif
      }
    }
  }

  static void pack_b(float* pack, int64_t j, const char* const* rows, Dtype dtype, int64_t n, int64_t width) {
    const int64_t panel = panel_of(width);
    float* block = pack + j / kKeys * kKeys * up(width, panel);
    for (int64_t r = 0; r < kGroup; ++r) {
      for (int64_t i = 0; i < width; i += panel) {
        float* dst = block + i * kKeys + (j % kKeys + r) * panel;
        const int64_t take = rows[r] == nullptr ? 0 : most(0, least(n - i, panel));
        elements::to_floats(dst, rows[r] == nullptr ? nullptr : rows[r] + i * size_of(dtype), dtype, take, least(width - i, panel));
      }
    }
  }

  static void pack_a(float* dst, const char* const* rows, int64_t count, Dtype dtype, int64_t n, int64_t width) {
    for (int64_t r = 0; r < count; ++r) elements::to_floats(dst + r * width, rows[r], dtype, n, width);
  }

  // s[rows][keys] = a t, for keys from j on.
  static void scores(const float* a, int64_t rows, const float* t, int64_t j, int64_t keys, int64_t width, float* s, int64_t lds) {
    multiply(rows, up(keys, kLanes), width, a, width, 1, t + j / kPanel * width * kPanel, kPanel * width, kPanel, s, lds, false);
  }

  // out[rows][width] (+)= p b, for keys from j (a multiple of kKeys) on.
  static void weigh(const float* p, int64_t ldp, int64_t rows, const float* b, int64_t j, int64_t keys, int64_t width, float* out, bool add) {
    const int64_t panel = panel_of(width);
    multiply(rows, width, up(keys, kLanes), p, ldp, 1, b + j * up(width, panel), kKeys * panel, panel, out, width, add);
  }
};

}  // namespace
}  // namespace cvmk::attention
