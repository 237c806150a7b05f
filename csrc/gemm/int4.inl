// int4_linear: weights are dequantised a cache's worth at a time, each through a table of its sixteen values.
//
// bfloat16 rows and results on AMX: weights rounded to bfloat16, as the reference does, and multiplied on tiles, few rows as W x^T, many as
// x W^T: a tile's sums are the same, for the order of the inputs is. Everything else: float32 weights and dot products over vectors of inputs.
// A row goes through the same operations whatever the other rows and the threads are.
#pragma once
#include "gemm/int4_vectors.inl"
#include "gemm/int4_wide.inl"

namespace cvmk::gemm {
namespace {

#if CVMK_GEMM_TILES
inline bool takes_tiles(const Linear& l) { return l.x_dtype == kBFloat16 && l.out_dtype == kBFloat16; }
#endif

int64_t int4_scratch(const Int4Linear& p, const Team& team) {
#if CVMK_GEMM_TILES
  if (takes_tiles(p.linear)) return p.linear.rows > kTurnedRows ? wide_scratch(p, team) : tiles_scratch(p, team);
#endif
  return vectors_scratch(p, team);
}

void run_int4(const Int4Linear& p, char* scratch, const Team& team) {
#if CVMK_GEMM_TILES
  if (takes_tiles(p.linear)) return p.linear.rows > kTurnedRows ? on_wide_tiles(p, scratch, team) : on_tiles(p, scratch, team);
#endif
  on_vectors(p, scratch, team);
}

}  // namespace
}  // namespace cvmk::gemm
