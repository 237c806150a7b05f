// What products on AMX tiles share. An operand is kept as tiles of 16 rows of 64 bytes, one behind the other.
#pragma once
#include "gemm/common.inl"

#if CVMK_GEMM_TILES

namespace {

constexpr int64_t kTile = kPanel * kStep;
constexpr int64_t kBand = 2 * kPanel;  // rows of x that are multiplied at one time

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

}  // namespace

#endif
