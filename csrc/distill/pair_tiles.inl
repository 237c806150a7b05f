// The same products on vector registers, two numbers of a sum at a time: vdpbf16ps (AVX512_BF16).
#pragma once

#include "common/pairs.h"
#include "distill/tiles.inl"

namespace cvmk::distill {
namespace {

using pairs::dot2;

// c [8][32] (+)= eight rows of tiles of a left operand times two columns of tiles of a right one.
__attribute__((noinline)) void eight_rows(int64_t depth, const Half* left, int64_t along, const Half* right, int64_t step, int64_t across, float* c, bool add) {
  F sum[8][2];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) sum[r][0] = sum[r][1] = F{};
  for (int64_t k = 0; k < depth; ++k, left += along, right += step)
    for (int64_t pair = 0; pair < 16; ++pair) {
      const __m512i first = _mm512_loadu_si512(right + pair * 32), second = _mm512_loadu_si512(right + across + pair * 32);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        int32_t word;
        memcpy(&word, left + r * 32 + pair * 2, 4);
        const __m512i one = _mm512_set1_epi32(word);
        sum[r][0] = dot2(sum[r][0], one, first);
        sum[r][1] = dot2(sum[r][1], one, second);
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* to = c + r * 32 + j * kLanes;
      simd::store(to, add ? simd::load(to) + sum[r][j] : sum[r][j]);
    }
}

struct PairTiles {
  static constexpr int64_t kColumns = 256, kSub = 256;  // for second-level caches of 1 MiB
  static constexpr int64_t kKeptBytes = int64_t{16} << 20;

  CVMK_INLINE static void begin() {}
  CVMK_INLINE static void end() {}
  static void product(int64_t m, int64_t n, int64_t depth, const Tiles& a, const Tiles& b, float* c, int64_t panel, bool add, Fetch, bool) {
    for (int64_t j = 0; j < n; j += 32)
      for (int64_t i = 0; i < m; i += 8)
        eight_rows(depth, a.data + i / 16 * a.across + i % 16 * 32, a.along, b.data + j / 16 * b.across, b.along, b.across, c + j / 32 * panel + i * 32, add);
  }
  // There is nothing that the vector units could do meanwhile.
  template <typename Aside>
  CVMK_INLINE static void beside(int64_t m, int64_t n, int64_t depth, const Tiles& a, const Tiles& b, float* c, int64_t panel, bool add, Fetch fetch, bool far, Aside&) {
    product(m, n, depth, a, b, c, panel, add, fetch, far);
  }
};

}  // namespace
}  // namespace cvmk::distill
