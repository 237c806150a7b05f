// Products of bfloat16 in pairs, summed in float32: vdpbf16ps on vector registers (AVX512_BF16).
//
// Operands are padded with zeros to depths of 32. A right operand lies in panels of 16 columns, [panel][depth / 2][16 columns][2], of which 16 pairs are an
// AMX tile. A left operand lies in rows, or across: [panel][depth / 2][kAcross][2].
#pragma once
#if defined(__AVX512F__)
#include "common/amx.h"
#include "common/pairs.h"
#include "linear/shape.inl"

namespace cvmk::linear {
namespace {

typedef uint16_t Half;

using pairs::dot2;
using pairs::narrow;

// c [R][kGroup] (+)= R rows of pairs, `row` numbers apart and `along` from pair to pair, times four panels of `panel` numbers.
template <int R>
__attribute__((noinline)) void pair_micro(int64_t pairs, const Half* a, int64_t row, int64_t along, const Half* b, int64_t panel, float* c, bool add) {
  F sum[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[r][j] = F{};
  for (int64_t k = 0; k < pairs; ++k, a += along, b += 32) {
    __m512i right[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) right[j] = _mm512_loadu_si512(b + j * panel);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t word;
      memcpy(&word, a + r * row, 4);
      const __m512i one = _mm512_set1_epi32(word);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = dot2(sum[r][j], one, right[j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      float* to = c + r * kGroup + j * kLanes;
      simd::store(to, add ? simd::load(to) + sum[r][j] : sum[r][j]);
    }
}

struct PairProducts {
  typedef Half Element;
  static constexpr int64_t kPart = 512;  // of a sum: such a part of a group stays in the first-level cache
  static_assert(kGroup == 4 * kLanes, "four panels");

  CVMK_INLINE static void begin() {}
  CVMK_INLINE static void end() {}
  CVMK_INLINE static int64_t depth(int64_t n) { return up(n, 32); }
  CVMK_INLINE static bool reads_in_place(const Matrix& m, int64_t, int64_t width) { return m.dtype == kBFloat16 && width % 32 == 0; }
  CVMK_INLINE static void put(Half* to, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(x)); }

  // 32 numbers of a row from i on, zeros behind the width.
  CVMK_INLINE static __m512i load_pairs(const Matrix& m, const void* row, int64_t i, int64_t width) {
    if (row == nullptr || i >= width) return _mm512_setzero_si512();
    if (m.dtype == kBFloat16) {
      const __mmask32 there = width - i >= 32 ? ~0u : (1u << (width - i)) - 1u;
      return _mm512_maskz_loadu_epi16(there, static_cast<const Half*>(row) + i);
    }
    const auto at = [&](int64_t j) { return j >= width ? F{} : elements::load_n(row, m.dtype, j, static_cast<int>(least(kLanes, width - j))); };
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(at(i))), narrow(at(i + 16)), 1);
  }

  CVMK_INLINE static void copy_row(const Matrix& m, const void* from, int64_t width, int64_t padded, Half* to) {
    for (int64_t i = 0; i < padded; i += 32) _mm512_storeu_si512(to + i, load_pairs(m, from, i, width));
  }

  static void turn(const Matrix& m, const void* const* rows, int64_t width, Half* to, int64_t depth, int64_t column) {
    for (int64_t side = 0; side < kAcross; side += 16) {
      Half* panel = to + (column + side) * depth;
      for (int64_t i = 0; i < depth; i += 32) {
        __m512i x[16];
        for (int r = 0; r < 16; ++r) x[r] = load_pairs(m, rows[side + r], i, width);
        transpose16(x);
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(panel + i * 16 + r * 32, x[r]);
      }
    }
  }

  // Two rows of 32 numbers as pairs, of the first 16 columns and of the others.
  CVMK_INLINE static void interleave(__m512i x, __m512i y, __m512i& first, __m512i& second) {
    const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);  // of every 8 columns the first and the last 4
    first = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
    second = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
  }
  static void lay_right(const Matrix& m, const void* const* rows, int64_t width, int64_t padded, Half* to, int64_t depth, int64_t s) {
    for (int64_t i = 0; i < padded; i += 32) {
      __m512i first, second;
      interleave(load_pairs(m, rows[0], i, width), load_pairs(m, rows[1], i, width), first, second);
      _mm512_storeu_si512(to + i * depth + s * 16, first);
      _mm512_storeu_si512(to + (i + 16) * depth + s * 16, second);
    }
  }
  static void lay_left(const Half* const* rows, int64_t padded, Half* to, int64_t depth, int64_t s) {
    const auto at = [](const Half* row, int64_t i) { return row == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(row + i); };
    for (int64_t i = 0; i < padded; i += kAcross) {
      __m512i first, second;
      interleave(at(rows[0], i), at(rows[1], i), first, second);
      Half* place = to + i * depth + s * kAcross;
      _mm512_storeu_si512(place, first);
      _mm512_storeu_si512(place + 32, second);
    }
  }
  CVMK_INLINE static void turn_left(Half*, int64_t, int64_t, int64_t, int64_t) {}

  static void multiply(int64_t rows, int64_t depth, const Half* left, int64_t row, int64_t along, const Half* right, int64_t panel, float* c, bool add) {
    if (depth == 0) memset(c, 0, static_cast<size_t>(rows * kGroup) * sizeof(float));
    for (int64_t k = 0; k < depth; k += kPart) {
      const int64_t pairs = least(kPart, depth - k) / 2;
      const Half *a = left + k / 2 * along, *b = right + k * 16;
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) pair_micro<4>(pairs, a + r * row, row, along, b, panel, c + r * kGroup, add || k > 0);
      if (rows - r >= 2) {
        pair_micro<2>(pairs, a + r * row, row, along, b, panel, c + r * kGroup, add || k > 0);
        r += 2;
      }
      if (rows > r) pair_micro<1>(pairs, a + r * row, row, along, b, panel, c + r * kGroup, add || k > 0);
    }
  }
  static void multiply_rows(int64_t rows, int64_t depth, const Half* left, int64_t stride, const Half* right, float* c) {
    multiply(rows, depth, left, stride, 2, right, 16 * depth, c, false);
  }
  static void multiply_across(int64_t depth, int64_t room, const Half* left, const Half* right, float* c, bool add) {
    multiply(kAcross, depth, left, 2, 2 * kAcross, right, 16 * room, c, add);
  }
};

}  // namespace
}  // namespace cvmk::linear
#endif
