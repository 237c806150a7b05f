// Products of float32 blocks on vector registers, with the instruction set that the including file is compiled for.
#pragma once

#include "common/simd.h"

namespace {
namespace product {

using simd::F;
using simd::kLanes;
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr int kRows = 6;
constexpr int64_t kPanel = kVectors * kLanes;  // columns of a right operand's panel

// Element (r, k) is at data[r * row + k / segment * jump + k % segment * along].
struct Left {
  const float* data;
  int64_t row, along, segment, jump;
};

// Panel p begins at data + p * panel and holds the kPanel columns of element k of the sum at k * along.
struct Right {
  const float* data;
  int64_t panel, along;
};

// c[R][C vectors] (+)= a b, summed in order of k from 0 and then added, so that long sums stay exact.
template <int R, int C>
__attribute__((noinline, unused)) void micro(int64_t depth, const Left& a, const float* b, int64_t bk, float* c, int64_t ldc, bool add) {
  F sum[R][C];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sum[r][j] = F{};
  const int64_t am = a.row, ak = a.along;
  const float* next = a.data;
  for (int64_t todo = depth; todo > 0; todo -= a.segment, next += a.jump) {
    const float* left = next;
    for (int64_t k = todo < a.segment ? todo : a.segment; k > 0; --k, left += ak, b += bk) {
      F right[C];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) right[j] = simd::load(b + j * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const F one = simd::set(left[r * am]);
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) sum[r][j] += one * right[j];
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      float* to = c + r * ldc + j * kLanes;
      simd::store(to, add ? simd::load(to) + sum[r][j] : sum[r][j]);
    }
}

template <int C>
inline void micro_rows(int64_t rows, int64_t depth, const Left& a, const float* b, int64_t bk, float* c, int64_t ldc, bool add) {
  switch (rows) {
    case 6: return micro<6, C>(depth, a, b, bk, c, ldc, add);
    case 5: return micro<5, C>(depth, a, b, bk, c, ldc, add);
    case 4: return micro<4, C>(depth, a, b, bk, c, ldc, add);
    case 3: return micro<3, C>(depth, a, b, bk, c, ldc, add);
    case 2: return micro<2, C>(depth, a, b, bk, c, ldc, add);
    default: return micro<1, C>(depth, a, b, bk, c, ldc, add);
  }
}

// c[m][n] (+)= a b over `depth`; n a multiple of the lanes.
inline void multiply(int64_t m, int64_t n, int64_t depth, const Left& a, const Right& b, float* c, int64_t ldc, bool add) {
  const float* right = b.data;
  for (int64_t j = 0; j < n; j += kPanel, right += b.panel) {
    const int64_t vectors = (n - j < kPanel ? n - j : kPanel) / kLanes;
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t rows = m - i < kRows ? m - i : kRows;
      const Left left{a.data + i * a.row, a.row, a.along, a.segment, a.jump};
      float* out = c + i * ldc + j;
      switch (vectors) {
#if defined(__AVX512F__)
        case 4: micro_rows<4>(rows, depth, left, right, b.along, out, ldc, add); break;
        case 3: micro_rows<3>(rows, depth, left, right, b.along, out, ldc, add); break;
#endif
        case 2: micro_rows<2>(rows, depth, left, right, b.along, out, ldc, add); break;
        default: micro_rows<1>(rows, depth, left, right, b.along, out, ldc, add); break;
      }
    }
  }
}

// The same in parts of the depth, so that a part of b's panel stays in the first-level cache while all rows of a pass by. `part` is a
// multiple of a's segment or divides it.
inline void multiply_parts(int64_t m, int64_t n, int64_t depth, int64_t part, const Left& a, const Right& b, float* c, int64_t ldc, bool add) {
  for (int64_t k = 0; k < depth; k += part) {
    const Left left{a.data + k / a.segment * a.jump + k % a.segment * a.along, a.row, a.along, a.segment, a.jump};
    multiply(m, n, depth - k < part ? depth - k : part, left, {b.data + k * b.along, b.panel, b.along}, c, ldc, add || k > 0);
  }
}

}  // namespace product
}  // namespace
