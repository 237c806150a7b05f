// Products of bfloat16 blocks on the AMX tiles, sums in float32. A tile is 16 rows of 64 bytes: for a left operand 16 x 32 numbers, for a
// right operand 16 pairs of its rows x 16 columns x 2. Operands: `a` is row-major [rows][width]; `at` (a transposed left operand) is
// [width / 16][rows / 32] tiles; `t` (a transposed right operand) is [key / 16][width / 32] tiles; `b` (a right operand whose rows are
// keys) is [key / 32][width / 16] tiles. Widths are padded to 32, rows too, and everything that is padded holds zeros.
#pragma once
#include "attention/math.inl"

namespace cvmk::attention {
namespace {

typedef uint16_t Half;
constexpr int64_t kTile = 512;  // elements of a tile

// Where the tiles of an operand are: a step in k is 32 numbers of the sum, a step in m or n is 16 rows or columns.
struct Tiles {
  const Half* data;
  int64_t step_k, step_mn, stride_bytes;
};

// c[m][n] (+)= a b; m and n multiples of 32, depth in steps of 32.
__attribute__((noinline, unused)) void multiply_tiles(int64_t m, int64_t n, int64_t depth, Tiles a, Tiles b, float* c, int64_t ldc, bool add) {
  const int64_t stride_c = ldc * 4;
  for (int64_t j = 0; j < n; j += 32) {
    const Half* right = b.data + j / 16 * b.step_mn;
    for (int64_t i = 0; i < m; i += 32) {
      const Half* left = a.data + i / 16 * a.step_mn;
      float* out = c + i * ldc + j;
      if (add) {
        _tile_loadd(0, out, stride_c);
        _tile_loadd(1, out + 16, stride_c);
        _tile_loadd(2, out + 16 * ldc, stride_c);
        _tile_loadd(3, out + 16 * ldc + 16, stride_c);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const Half* bk = right;
      const Half* ak = left;
      for (int64_t k = 0; k < depth; ++k, ak += a.step_k, bk += b.step_k) {
        _tile_loadd(6, bk, b.stride_bytes);
        _tile_loadd(4, ak, a.stride_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, bk + b.step_mn, b.stride_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, ak + a.step_mn, a.stride_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, out, stride_c);
      _tile_stored(1, out + 16, stride_c);
      _tile_stored(2, out + 16 * ldc, stride_c);
      _tile_stored(3, out + 16 * ldc + 16, stride_c);
    }
  }
}

CVMK_INLINE __m512i load_half(const char* row, int64_t i, int64_t n) {  // 32 numbers from i on, zeros behind n
  if (row == nullptr || i >= n) return _mm512_setzero_si512();
  if (i + 32 <= n) return _mm512_loadu_si512(row + i * 2);
  return _mm512_maskz_loadu_epi16((1u << (n - i)) - 1u, row + i * 2);
}

struct AmxProducts {
  typedef Half Element;
  static constexpr bool kPrecise = false;
  static constexpr bool kTiles = true;
  static constexpr int kGroup = 32;
  static constexpr int kRows = 64, kKeys = 256, kGradRows = 128, kGradKeys = 128;

  static void begin() { configure_tiles(kWholeTiles); }
  static void end() { _tile_release(); }
  static int64_t padded(int64_t width) { return up(width, 32); }
  static int64_t key_step() { return 32; }
  static int64_t t_size(int64_t keys, int64_t width) { return up(keys, 32) * width; }
  static int64_t b_size(int64_t keys, int64_t width) { return up(keys, 32) * width; }

  static void pack_t(Half* pack, int64_t j, const char* const* rows, Dtype, int64_t n, int64_t width) {
    for (int64_t first = 0; first < kGroup; first += 16) {
      Half* dst = pack + (j + first) * width;
      for (int64_t i = 0; i < width; i += 32, dst += kTile) {
        __m512i x[16];
        for (int r = 0; r < 16; ++r) x[r] = load_half(rows[first + r], i, n);
        transpose16(x);
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(dst + r * 32, x[r]);
      }
    }
  }

  static void pack_b(Half* pack, int64_t j, const char* const* rows, Dtype, int64_t n, int64_t width) {
    const __m512i even = interleaved_pairs(0), odd = interleaved_pairs(16);
    for (int r = 0; r < 16; ++r) {
      Half* dst = pack + j * width + r * 32;
      for (int64_t i = 0; i < width; i += 32, dst += 2 * kTile) {
        const __m512i x = load_half(rows[2 * r], i, n), y = load_half(rows[2 * r + 1], i, n);
        _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(x, even, y));
        _mm512_storeu_si512(dst + kTile, _mm512_permutex2var_epi16(x, odd, y));
      }
    }
  }

  // at, in a pack of `total` rows: rows j to j + 31.
  static void pack_at(Half* pack, int64_t j, int64_t total, const char* const* rows, int64_t n, int64_t width) {
    const __m512i even = interleaved_pairs(0), odd = interleaved_pairs(16);
    for (int64_t i = 0; i < width; i += 32) {
      __m512i low[16], high[16];
      for (int r = 0; r < 16; ++r) {
        const __m512i x = load_half(rows[2 * r], i, n), y = load_half(rows[2 * r + 1], i, n);
        low[r] = _mm512_permutex2var_epi16(x, even, y);
        high[r] = _mm512_permutex2var_epi16(x, odd, y);
      }
      transpose16(low);
      transpose16(high);
      Half* dst = pack + (i / 16 * (total / 32) + j / 32) * kTile;
      for (int r = 0; r < 16; ++r) {
        _mm512_storeu_si512(dst + r * 32, low[r]);
        _mm512_storeu_si512(dst + total / 32 * kTile + r * 32, high[r]);
      }
    }
  }

  // `count` rows and zeros up to a multiple of 32.
  static void pack_a(Half* dst, const char* const* rows, int64_t count, Dtype, int64_t n, int64_t width) {
    for (int64_t r = 0; r < up(count, 32); ++r)
      for (int64_t i = 0; i < width; i += 32) _mm512_storeu_si512(dst + r * width + i, load_half(r < count ? rows[r] : nullptr, i, n));
  }

  static void scores(const Half* a, int64_t rows, const Half* t, int64_t j, int64_t keys, int64_t width, float* s, int64_t lds) {
    const Tiles left{a, 32, 16 * width, width * 2}, right{t + j * width, kTile, 16 * width, 64};
    multiply_tiles(up(rows, 32), up(keys, 32), width / 32, left, right, s, lds, false);
  }

  // p: 16-bit numbers in rows of ldp floats.
  static void weigh(const float* p, int64_t ldp, int64_t rows, const Half* b, int64_t j, int64_t keys, int64_t width, float* out, bool add) {
    const Half* left = reinterpret_cast<const Half*>(p);
    multiply_tiles(up(rows, 32), width, up(keys, 32) / 32, Tiles{left, 32, 32 * ldp, ldp * 4}, Tiles{b + j * width, 32 * width, kTile, 64}, out, width, add);
  }

 private:
  static __m512i interleaved_pairs(int first) {
    uint16_t index[32];
    for (int i = 0; i < 16; ++i) {
      index[2 * i] = static_cast<uint16_t>(first + i);
      index[2 * i + 1] = static_cast<uint16_t>(32 + first + i);
    }
    return _mm512_loadu_si512(index);
  }
};

}  // namespace
}  // namespace cvmk::attention
