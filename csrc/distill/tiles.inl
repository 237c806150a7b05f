// Operands in bfloat16 laid out as tiles: how rows of memory become operands, on any level with AVX-512.
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

struct Nothing {
  CVMK_INLINE void operator()() const {}
};

// To bfloat16, 16 numbers and 32; an avx512 level whose processor has the instruction is not compiled for it.
CVMK_INLINE __m256i lowered16(F x) {
#if defined(__AVX512BF16__)
  return simd::bits<__m256i>(_mm512_cvtneps_pbh(simd::bits<__m512>(x)));
#else
  __m256i h;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(x));
  return h;
#endif
}
CVMK_INLINE __m512i lowered32(__m512 low, __m512 high) {
#if defined(__AVX512BF16__)
  return simd::bits<__m512i>(_mm512_cvtne2ps_pbh(high, low));
#else
  __m512i h;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(h) : "v"(low), "v"(high));
  return h;
#endif
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
  return lowered32(low, high);
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
