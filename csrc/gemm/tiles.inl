// What products on AMX tiles share. An operand is kept as tiles of 16 rows of 64 bytes, one behind the other.
#pragma once
#include "common/amx.h"
#include "gemm/common.inl"

#if CVMK_GEMM_TILES

namespace cvmk::gemm {
namespace {

constexpr int64_t kTile = kPanel * kStep;
constexpr int64_t kBand = 2 * kPanel;  // rows of x that are multiplied at one time

// Tiles for sums (0 ... 3) and for x (4, and 5 of two bands) have `columns` columns, those for weights 16.
inline void configure_columns(int64_t columns) {
  TileConfig c = kWholeTiles;
  for (int i = 0; i <= 4; ++i) c.row_bytes[i] = static_cast<uint16_t>(columns * 4);
  configure_tiles(c);
}

// Tiles of sums in memory, kDown below each other times kBeside beside each other.
template <int kBeside, int kSum>
CVMK_INLINE char* sum_at(char* sums, int64_t stride) {
  return sums + kSum / kBeside * kPanel * stride + kSum % kBeside * kStep;
}

template <int kDown, int kBeside>
CVMK_INLINE void begin_sums(char* sums, int64_t stride, bool first) {
  if (first) {
    _tile_zero(0);
    if constexpr (kDown * kBeside > 1) _tile_zero(1);
    if constexpr (kDown * kBeside > 2) _tile_zero(2);
    if constexpr (kDown * kBeside > 2) _tile_zero(3);
  } else {
    _tile_loadd(0, (sum_at<kBeside, 0>(sums, stride)), stride);
    if constexpr (kDown * kBeside > 1) _tile_loadd(1, (sum_at<kBeside, 1>(sums, stride)), stride);
    if constexpr (kDown * kBeside > 2) _tile_loadd(2, (sum_at<kBeside, 2>(sums, stride)), stride);
    if constexpr (kDown * kBeside > 2) _tile_loadd(3, (sum_at<kBeside, 3>(sums, stride)), stride);
  }
}

template <int kDown, int kBeside>
CVMK_INLINE void end_sums(char* sums, int64_t stride) {
  _tile_stored(0, (sum_at<kBeside, 0>(sums, stride)), stride);
  if constexpr (kDown * kBeside > 1) _tile_stored(1, (sum_at<kBeside, 1>(sums, stride)), stride);
  if constexpr (kDown * kBeside > 2) _tile_stored(2, (sum_at<kBeside, 2>(sums, stride)), stride);
  if constexpr (kDown * kBeside > 2) _tile_stored(3, (sum_at<kBeside, 3>(sums, stride)), stride);
}

}  // namespace
}  // namespace cvmk::gemm

#endif
