// AMX tiles in bfloat16: a product of two packed operands, and how rows of memory become operands.
// A tile is 16 rows of 64 bytes: 16 x 32 numbers of a left operand, 16 pairs x 16 columns of a right one.
#pragma once

#include "common/amx.h"
#include "distill/vectors.inl"

namespace cvmk::distill {
namespace {

typedef uint16_t Half;
constexpr int64_t kTile = 512;  // numbers of a tile

// Packed tiles of an operand: steps in numbers from tile to tile along the sum and across it.
struct Tiles {
  const Half* data;
  int64_t along, across;
};

// What a product fetches to the second-level cache on the way, `lines` cache lines for every step of a 32 x 32 block of its result.
struct Fetch {
  const Half* data;
  int64_t lines;
};

// `count` numbers fetched during m / 32 * depth steps.
CVMK_INLINE Fetch fetch_of(const Half* data, int64_t count, int64_t m, int64_t depth) {
  const int64_t steps = m / 32 * depth;
  return {data, (count / 32 + steps - 1) / steps};
}

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

struct Nothing {
  CVMK_INLINE void operator()() const {}
};

__attribute__((noinline)) void multiply(int64_t m, int64_t n, int64_t depth, const Tiles& a, const Tiles& b, float* c, int64_t panel, bool add, Fetch fetch,
                                        bool far) {
  Nothing nothing;
  multiply_beside(m, n, depth, a, b, c, panel, add, fetch, far, nothing);
}

// -- packing ------------------------------------------------------------------------------------------------------------------------------
// 32 numbers of a row of bfloat16, with kLowered of float32, from i on, zeros behind the width.
template <bool kLowered>
CVMK_INLINE __m512i load_pairs(const void* row, int64_t i, int64_t width) {
  if (row == nullptr || i >= width) return _mm512_setzero_si512();
  const __mmask32 there = width - i >= 32 ? ~0u : (1u << (width - i)) - 1u;
  if constexpr (!kLowered) return _mm512_maskz_loadu_epi16(there, static_cast<const Half*>(row) + i);
  const float* from = static_cast<const float*>(row) + i;
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), from), high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), from + 16);
  return simd::bits<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// 16 rows to [width / 32] tiles of a left operand.
template <bool kLowered>
CVMK_INLINE void pack_left(const void* const* rows, int64_t width, int64_t padded, Half* to) {
  for (int r = 0; r < 16; ++r)
    for (int64_t i = 0; i < padded; i += 32) _mm512_storeu_si512(to + i / 32 * kTile + r * 32, load_pairs<kLowered>(rows[r], i, width));
}

// 16 rows to [width / 32] tiles of a right operand whose columns they are.
template <bool kLowered>
CVMK_INLINE void pack_turned(const void* const* rows, int64_t width, int64_t padded, Half* to) {
  for (int64_t i = 0; i < padded; i += 32, to += kTile) {
    __m512i x[16];
    for (int r = 0; r < 16; ++r) x[r] = load_pairs<kLowered>(rows[r], i, width);
    transpose16(x);
    for (int r = 0; r < 16; ++r) _mm512_storeu_si512(to + r * 32, x[r]);
  }
}

// 32 rows to [width / 16] tiles of a right operand along whose sum they are, `across` numbers apart.
template <bool kLowered>
CVMK_INLINE void pack_pairs(const void* const* rows, int64_t width, int64_t padded, Half* to, int64_t across) {
  for (int r = 0; r < 16; ++r) {
    Half* tile = to + r * 32;
    for (int64_t i = 0; i < padded; i += 32, tile += 2 * across) {
      const __m512i x = load_pairs<kLowered>(rows[2 * r], i, width), y = load_pairs<kLowered>(rows[2 * r + 1], i, width);
      const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);  // of every 8 columns the first and the last 4
      _mm512_storeu_si512(tile, _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high));
      _mm512_storeu_si512(tile + across, _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high));
    }
  }
}

}  // namespace
}  // namespace cvmk::distill
