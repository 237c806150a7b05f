// Products of bfloat16 on AMX tiles. Operands are those of pair_products.inl, whose right panels are tiles as they lie; of a left operand that is read
// across, each 32 elements of the sum are turned into two tiles.
#pragma once
#if defined(__AMX_TILE__)
#include "linear/pair_products.inl"

namespace cvmk::linear {
namespace {

struct TileProducts : PairProducts {
  static_assert(kAcross == 32 && kGroup == 64 && kRowBlock % 32 == 0, "two tiles by four");

  CVMK_INLINE static void begin() { configure_tiles(kWholeTiles); }
  CVMK_INLINE static void end() { _tile_release(); }
  // Tiles are read whole, and so are 32 rows.
  CVMK_INLINE static bool reads_in_place(const Matrix& m, int64_t rows, int64_t width) { return rows % 32 == 0 && PairProducts::reads_in_place(m, rows, width); }

  // c [32][kGroup] (+)= two tiles of rows, `row` bytes from row to row, `below` numbers apart and `along` from step to step, times the group, whose panels
  // are `panel` numbers apart.
  CVMK_INLINE static void block(int64_t depth, const Half* left, int64_t row, int64_t below, int64_t along, const Half* right, int64_t panel, float* c, bool add) {
    constexpr int64_t kBytes = kGroup * 4;
    for (int64_t j = 0; j < kGroup; j += 32, right += 2 * panel, c += 32) {
      if (add) {
        _tile_loadd(0, c, kBytes);
        _tile_loadd(1, c + 16, kBytes);
        _tile_loadd(2, c + 16 * kGroup, kBytes);
        _tile_loadd(3, c + 16 * kGroup + 16, kBytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const Half *a = left, *b = right;
      for (int64_t k = 0; k < depth; k += 32, a += along, b += 512) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + panel, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + below, row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c, kBytes);
      _tile_stored(1, c + 16, kBytes);
      _tile_stored(2, c + 16 * kGroup, kBytes);
      _tile_stored(3, c + 16 * kGroup + 16, kBytes);
    }
  }

  static void multiply_rows(int64_t rows, int64_t depth, const Half* left, int64_t stride, const Half* right, float* c) {
    for (int64_t r = 0; r < rows; r += 32) block(depth, left + r * stride, 2 * stride, 16 * stride, 32, right, 16 * depth, c + r * kGroup, false);
  }
  static void multiply_across(int64_t depth, int64_t room, const Half* left, const Half* right, float* c, bool add) {
    block(depth, left, 64, 512, 32 * kAcross, right, 16 * room, c, add);
  }

  // The rows [first, first + rows), a multiple of 32, of an operand of `padded` columns, from pairs [16][kAcross][2] to two tiles [16][16][2].
  static void turn_left(Half* across, int64_t padded, int64_t depth, int64_t first, int64_t rows) {
    for (int64_t i = 0; i < padded; i += kAcross)
      for (int64_t s = first; s < first + rows; s += 32) {
        Half* const place = across + i * depth + s * kAcross;
        __m512i x[2][16];
        for (int r = 0; r < 16; ++r)
          for (int side = 0; side < 2; ++side) x[side][r] = _mm512_loadu_si512(place + r * 64 + side * 32);
        for (int side = 0; side < 2; ++side) {
          transpose16(x[side]);
          for (int r = 0; r < 16; ++r) _mm512_storeu_si512(place + side * 512 + r * 32, x[side][r]);
        }
      }
  }
};

}  // namespace
}  // namespace cvmk::linear
#endif
