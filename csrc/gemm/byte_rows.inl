// Rows of float32 to the bytes that int8 and int4_bytes multiply, once for several products.
#pragma once
#include "gemm/int4_bytes.inl"
#include "gemm/int8_rows.inl"

namespace cvmk::gemm {
namespace {

int64_t byte_rows_scratch(const ByteRows&, const Team&) { return 0; }

void run_byte_rows(const ByteRows& p, char*, const Team&) {
  const int64_t padded = up(p.inputs, kStep);
  const bool tiles = p.group == 0 && in_tiles(p.rows, p.vnni);
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* x = p.x + r * p.inputs;
    if (p.group > 0) p.scales[r] = quantise_groups(x, p.inputs, p.group, p.bytes + r * padded, p.sums + r * (p.inputs / p.group));
    else p.scales[r] = quantise_row<kFloat32>(x, nullptr, p.inputs, p.vnni && !tiles ? 0x80 : 0, byte_row(p.bytes, r, padded, tiles), tiles ? kPanel * kStep : kStep, p.range);
  }
}

}  // namespace
}  // namespace cvmk::gemm
