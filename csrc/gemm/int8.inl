// int8_linear: rows are quantised once a thread, multiplied exactly into int32, and finished while a tile of sums is hot.
#pragma once
#include "gemm/int8_rows.inl"
#include "gemm/int8_tiles.inl"
#include "gemm/int8_vectors.inl"

namespace {

constexpr int64_t kRoundBytes = 1 << 19;   // quantised rows that stand in the second cache of a thread
constexpr int64_t kAlone = 1 << 18;        // below so many multiplications the calling thread does the work
constexpr int64_t kCachedWeight = 1 << 20;  // bytes of a weight that every thread can keep

template <bool kVnni>
inline int int8_linear_as(const Int8Linear& p) {
  const Linear& l = p.linear;
  if (l.rows == 0) return 0;
  const int64_t padded = up(l.inputs, kStep), columns = out_columns(l);
  const bool tiles = CVMK_GEMM_TILES && l.rows > (kVnni ? 4 : 0);
  const int limit = l.rows * l.inputs * l.outputs <= kAlone ? 1 : threads::limit();
  const int width = l.activation == kSwiglu ? 2 : 4;
  const bool apart = padded * l.outputs <= kCachedWeight || l.rows >= l.outputs;
  const int64_t round = rows_of_round(l.rows, kRoundBytes / padded, apart ? limit : 1), blocks = up(columns, width * kPanel) / (width * kPanel);
  const int64_t units = (l.rows + round - 1) / round * blocks;
  const int threads = static_cast<int>(least(limit, units));
  const int64_t sums_each = (tiles ? kSumRows : kVectorRows) * kMostPanels * kPanel, inverses = p.smooth_scale ? padded : 0;
  const int64_t each = up(round * padded + (up(round, 16) + sums_each + inverses) * 4, 4096) + 1024;
  char* scratch = static_cast<char*>(l.scratch(threads * each));
  if (!scratch) return 1;
  share(threads, units, [&](int64_t first, int64_t last, int thread) {
    Scratch own{scratch + thread * each};
    uint8_t* a = own.take<uint8_t>(round * padded);
    float *row_scales = own.take<float>(up(round, 16)), *inverse = p.smooth_scale ? own.take<float>(inverses) : nullptr;
    int32_t* sums = own.take<int32_t>(sums_each);
    if (inverse) invert(p, inverse, padded);
#if CVMK_GEMM_TILES
    if (tiles) configure_rows(l.rows);
#endif
    int64_t quantised = -1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / blocks * round, rows = least(round, l.rows - row);
      for (int64_t r = 0; row != quantised && r < rows; ++r) {
        uint8_t* to = tiles ? a + r / kPanel * kPanel * padded + r % kPanel * kStep : a + r * padded;
        row_scales[r] = quantise(p, inverse, row + r, kVnni && !tiles ? 0x80 : 0, to, tiles ? kPanel * kStep : kStep);
      }
      quantised = row;
      const Item item = item_of(l, i % blocks * width * kPanel, width);
#if CVMK_GEMM_TILES
      if (tiles) {
        tile_item(p, item, a, padded / kStep, row_scales, row, rows, sums);
        continue;
      }
#endif
      vector_item<kVnni>(p, item, a, padded, row_scales, row, rows, sums);
    }
#if CVMK_GEMM_TILES
    if (tiles) _tile_release();
#endif
  });
  return 0;
}

inline int int8_linear_level(const Int8Linear& p) {
#if defined(__AVX512F__)
  if (p.vnni) return int8_linear_as<true>(p);
#endif
  return int8_linear_as<false>(p);
}

}  // namespace
