// Rows of x for int4_linear's tiles: turned, so that a row is a column of a tile, in the order in which the weight's inputs are stored.
#pragma once
#include "gemm/tiles.inl"

#if CVMK_GEMM_TILES

namespace cvmk::gemm {
namespace {

constexpr int64_t kTileInputs = 32;

// -- rows of x ---------------------------------------------------------------------------------------------------------------------
// Up to 16 rows of x from `row` on as [inputs / 2 pairs][16 rows][2], zeros behind the last row.
inline void turn_rows(const Linear& l, int64_t row, int64_t rows, char* to) {
  const int64_t stride = l.x_stride * 2;
  const char* x = static_cast<const char*>(l.x) + row * stride;
  for (const char* end = x + l.inputs * 2; x < end; x += kStep, to += kTile) {
    __m512i a[kPanel];
    if (rows == kPanel) {
#pragma GCC unroll 4
      for (int q = 0; q < kPanel; q += 4) {
        const char* from = x + q * stride;
        a[q] = _mm512_loadu_si512(from);
        a[q + 1] = _mm512_loadu_si512(from + stride);
        a[q + 2] = _mm512_loadu_si512(from + 2 * stride);
        a[q + 3] = _mm512_loadu_si512(from + 3 * stride);
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < kPanel; ++r) a[r] = r < rows ? _mm512_loadu_si512(x + r * stride) : _mm512_setzero_si512();
    }
    transpose16(a);
#pragma GCC unroll 16
    for (int i = 0; i < kPanel; ++i) _mm512_store_si512(to + i * kStep, a[i]);
  }
}

// Turned rows with their inputs in stored order: a half of every word comes from the pair of one input.
inline void reorder(const int32_t* order, int64_t inputs, const char* from, char* to) {
  for (int64_t k = 0; k < inputs; k += 2, to += kStep) {
    const int64_t first = order[k], second = order[k + 1];
    const __m512i low = _mm512_srl_epi32(_mm512_load_si512(from + first / 2 * kStep), _mm_cvtsi64_si128(first % 2 * 16));
    const __m512i high = _mm512_sll_epi32(_mm512_load_si512(from + second / 2 * kStep), _mm_cvtsi64_si128(16 - second % 2 * 16));
    _mm512_store_si512(to, _mm512_mask_blend_epi16(0xAAAAAAAAu, low, high));
  }
}

// Rows of a round as tiles [rows / 16][inputs / 32][16 pairs of inputs][16 rows][2]; one row alone as it is. `turned` has room for 16 rows.
inline void pack_rows(const Int4Linear& p, int64_t row, int64_t rows, bool single, char* to, char* turned) {
  const Linear& l = p.linear;
  if (single) {
    const uint16_t* x = static_cast<const uint16_t*>(l.x) + row * l.x_stride;
    uint16_t* all = reinterpret_cast<uint16_t*>(to);
    if (!p.order) memcpy(all, x, static_cast<size_t>(l.inputs) * 2);
    else
      for (int64_t k = 0; k < l.inputs; ++k) all[k] = x[p.order[k]];
    return;
  }
  for (int64_t r = 0; r < rows; r += kPanel, to += l.inputs * kPanel * 2) {
    turn_rows(l, row + r, least(kPanel, rows - r), p.order ? turned : to);
    if (p.order) reorder(p.order, l.inputs, turned, to);
  }
}

}  // namespace
}  // namespace cvmk::gemm

#endif
