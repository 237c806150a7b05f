// Products of packed bfloat16 operands on the AMX tiles.
#pragma once

#include "distill/tiles.inl"

namespace cvmk::distill {
namespace {

// c [n / 32][m][32] (+)= a b: panels of 32 columns, `panel` numbers apart; m and n multiples of 32, `depth` steps of 32. Two columns of tiles
// of b stay in the first-level cache; a is streamed from the second, so that it does not displace them. `far`: c may lie in memory.
// aside() is called in every step: the vector units have time while the tiles multiply.
template <typename Aside>
CVMK_INLINE void multiply_beside(int64_t m, int64_t n, int64_t depth, const Tiles& a, const Tiles& b, float* c, int64_t panel, bool add, Fetch fetch, bool far,
                                 Aside& aside) {
  constexpr int64_t kBytes = 128;
  const int64_t next_lines = far ? (64 + depth - 1) / depth : 0;
  for (int64_t j = 0; j < n; j += 32) {
    for (int64_t i = 0; i < m; i += 32) {
      float* to = c + j / 32 * panel + i * 32;
      const Half *left = a.data + i / 16 * a.across, *right = b.data + j / 16 * b.across;
      const float* next = i + 32 < m ? to + 1024 : c + (j / 32 + 1) * panel;  // the next block
      if (add) {
        _tile_loadd(0, to, kBytes);
        _tile_loadd(1, to + 16, kBytes);
        _tile_loadd(2, to + 512, kBytes);
        _tile_loadd(3, to + 512 + 16, kBytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < depth; ++k, left += a.along, right += b.along) {
        for (int64_t line = 0; line < next_lines; ++line, next += 16) __builtin_prefetch(next, 1, 2);
        for (int64_t line = 0; line < fetch.lines; ++line, fetch.data += 32) __builtin_prefetch(fetch.data, 0, 2);
        _tile_loadd(6, right, 64);
        _tile_stream_loadd(4, left, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + b.across, 64);
        _tile_dpbf16ps(1, 4, 7);
        aside();
        _tile_stream_loadd(5, left + a.across, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, kBytes);
      _tile_stored(1, to + 16, kBytes);
      _tile_stored(2, to + 512, kBytes);
      _tile_stored(3, to + 512 + 16, kBytes);
    }
  }
}

__attribute__((noinline)) void multiply(int64_t m, int64_t n, int64_t depth, const Tiles& a, const Tiles& b, float* c, int64_t panel, bool add, Fetch fetch,
                                        bool far) {
  Nothing nothing;
  multiply_beside(m, n, depth, a, b, c, panel, add, fetch, far, nothing);
}

// What TileProducts asks of the unit that multiplies.
struct AmxTiles {
  static constexpr int64_t kColumns = 512, kSub = 512;
  static constexpr int64_t kKeptBytes = 0;  // logits are made anew in every sweep, which is cheaper than keeping them

  CVMK_INLINE static void begin() { configure_tiles(kWholeTiles); }
  CVMK_INLINE static void end() { _tile_release(); }
  template <typename Aside>
  CVMK_INLINE static void beside(int64_t m, int64_t n, int64_t depth, const Tiles& a, const Tiles& b, float* c, int64_t panel, bool add, Fetch fetch, bool far,
                                 Aside& aside) {
    multiply_beside(m, n, depth, a, b, c, panel, add, fetch, far, aside);
  }
  CVMK_INLINE static void product(int64_t m, int64_t n, int64_t depth, const Tiles& a, const Tiles& b, float* c, int64_t panel, bool add, Fetch fetch, bool far) {
    multiply(m, n, depth, a, b, c, panel, add, fetch, far);
  }
};

}  // namespace
}  // namespace cvmk::distill
