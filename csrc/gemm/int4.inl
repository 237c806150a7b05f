// int4_linear: weights are dequantised a cache's worth at a time, each through a table of its sixteen values.
//
// bfloat16 rows and results on AMX: weights rounded to bfloat16, as the reference does, and multiplied on tiles, few rows as W x^T, many as
// x W^T: a tile's sums are the same, for the order of the inputs is. Everything else: float32 weights and dot products over vectors of inputs.
// A row goes through the same operations whatever the other rows and the threads are.
#pragma once
#include "gemm/int4_vectors.inl"
#include "gemm/int4_wide.inl"

namespace {

inline int int4_linear_level(const Int4Linear& p) {
#if CVMK_GEMM_TILES
  if (p.linear.x_dtype == kBfloat16 && p.linear.out_dtype == kBfloat16) return p.linear.rows > kTurnedRows ? on_wide_tiles(p) : on_tiles(p);
#endif
  return on_vectors(p);
}

}  // namespace
