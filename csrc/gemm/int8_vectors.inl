// Products of quantised rows on vectors: four bytes a lane, by vpdpbusd where there is one.
#pragma once
#include "common/quads.h"
#include "gemm/common.inl"

namespace cvmk::gemm {
namespace {

using quads::dot4;

constexpr int kVectors = kPanel / kLanes;
constexpr int64_t kVectorRows = 24;  // rows of sums that stand at one time

// `next`: bytes that later calls will read in two places, a line of each of which is asked for at every step; beyond the end of a weight they are never read.
template <bool kVnni, int kRows, int kPanels>
inline void vector_block(const uint8_t* a, int64_t padded, const int8_t* const* b, const int32_t* const* start, const int8_t* const* next, int32_t* sums, int64_t stride) {
  // All loops over sums are unrolled: where one is not, GCC keeps a copy of the sums in memory, too.
  I sum[kRows][kPanels * kVectors];
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      I first{};
      if (kVnni) memcpy(&first, start[p] + v * kLanes, sizeof first);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][p * kVectors + v] = first;
    }
  for (int64_t k = 0; k < padded; k += 4) {
    __builtin_prefetch(next[0] + k * kPanel, 0, 2);
    __builtin_prefetch(next[1] + k * kPanel, 0, 2);
    I w[kPanels * kVectors];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) memcpy(&w[p * kVectors + v], b[p] + k * kPanel + v * kLanes * 4, sizeof(I));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t word;
      memcpy(&word, a + r * padded + k, 4);
      const I x = simd::seti(word);
#pragma GCC unroll 16
      for (int p = 0; p < kPanels * kVectors; ++p) sum[r][p] = dot4<kVnni>(sum[r][p], x, w[p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) memcpy(sums + r * stride + p * kPanel + v * kLanes, &sum[r][p * kVectors + v], sizeof(I));
}

#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kBlockPanels = 4;
#elif defined(__AVX2__)
constexpr int kBlockRows = 2, kBlockPanels = 2;
#else
constexpr int kBlockRows = 1, kBlockPanels = 1;
#endif

template <bool kVnni, int kPanels>
inline int vector_rows(int64_t rows, const uint8_t* a, int64_t padded, const int8_t* const* b, const int32_t* const* start, const int8_t* const* next, int32_t* sums, int64_t stride) {
  if constexpr (kBlockRows >= 6) {
    if (rows >= 6 && rows != 8) return vector_block<kVnni, 6, kPanels>(a, padded, b, start, next, sums, stride), 6;
    if (rows >= 4) return vector_block<kVnni, 4, kPanels>(a, padded, b, start, next, sums, stride), 4;
  }
  if constexpr (kBlockRows >= 2)
    if (rows >= 2) return vector_block<kVnni, 2, kPanels>(a, padded, b, start, next, sums, stride), 2;
  return vector_block<kVnni, 1, kPanels>(a, padded, b, start, next, sums, stride), 1;
}

// Rows [0, rows) of bytes times the item's panels: sums [rows][stride].
template <bool kVnni>
inline void vector_product(const Int8Linear& p, const Item& item, const uint8_t* a, int64_t padded, int64_t rows, int32_t* sums, int64_t stride) {
  const int64_t panels = up(p.linear.outputs, kPanel) / kPanel;
  const int32_t* starts = p.sums != nullptr ? p.sums : reinterpret_cast<const int32_t*>(p.weight + panels * kPanel * padded);
  int done = 0;
  while (done < item.count) {
    const int left = item.count - done;
    const int width = left >= 4 && kBlockPanels >= 4 ? 4 : left >= 2 && kBlockPanels >= 2 ? 2 : 1;
    const int8_t* b[4];
    const int32_t* start[4];
    for (int i = 0; i < width; ++i) {
      b[i] = p.weight + item.panels[done + i] * kPanel * padded;
      start[i] = starts + item.panels[done + i] * kPanel;
    }
    for (int64_t r = 0; r < rows;) {
      const uint8_t* from = a + r * padded;
      // The panels behind these whose turn it is in this call: three calls of few rows ask for all four.
      const int64_t turn = 2 * (r / kBlockRows);
      const int8_t* behind = b[width - 1] + kPanel * padded;
      const int8_t* next[2] = {behind + turn % width * kPanel * padded, behind + (turn + 1) % width * kPanel * padded};
      int32_t* to = sums + r * stride + done * kPanel;
      if constexpr (kBlockPanels >= 4)
        if (width == 4) {
          r += vector_rows<kVnni, 4>(rows - r, from, padded, b, start, next, to, stride);
          continue;
        }
      if constexpr (kBlockPanels >= 2)
        if (width == 2) {
          r += vector_rows<kVnni, 2>(rows - r, from, padded, b, start, next, to, stride);
          continue;
        }
      r += vector_rows<kVnni, 1>(rows - r, from, padded, b, start, next, to, stride);
    }
    done += width;
  }
}

template <bool kVnni>
inline void vector_item(const Int8Linear& p, const Item& item, const uint8_t* a, int64_t padded, const float* scales, int64_t row, int64_t rows, int32_t* sums) {
  const int64_t stride = item.count * kPanel;
  for (int64_t r = 0; r < rows; r += kVectorRows) {
    const int64_t n = least(kVectorRows, rows - r);
    vector_product<kVnni>(p, item, a + r * padded, padded, n, sums, stride);
    finish(p.linear, item, sums, stride, scales + r, row + r, n);
  }
}

}  // namespace
}  // namespace cvmk::gemm
