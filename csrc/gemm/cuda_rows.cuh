// What the linears of few rows share. Limit: the bytes of the weight, which is streamed once, 16 bytes a lane and load. A block keeps all rows of x
// in shared memory and goes from group to group of outputs; a warp has kColumns weight rows at a time, so that as many loads are under way and
// what it reads of x serves all of them. Where a layer has few outputs, several warps share a weight row, each with a part of its inputs; their
// sums are added in the order of the parts. How many do so depends on the sizes of the weight alone: a row's result does not depend on the others.
#pragma once

#include "common/cuda_math.cuh"
#include "common/cuda_types.cuh"
#include "gemm/cuda_rows.h"

namespace cvmk::gemm {

constexpr int kThreads = 256, kWarps = kThreads / 32, kMostColumns = 4;
constexpr int64_t kBlocks = 264;  // two for each multiprocessor of the largest device

// Warps that share a weight row; a power of two. `bytes` of a row, of which a warp reads 512 at a time.
inline int warps_of_row(int64_t outputs, int64_t bytes) {
  int warps = 1;
  while (warps < kWarps && outputs * warps < kBlocks * kWarps * kMostColumns && bytes > 512 * warps) warps *= 2;
  return warps;
}

inline dim3 grid_for(int64_t outputs, int shared_by, int columns) {
  const int64_t in_a_block = kWarps / shared_by * columns, groups = (outputs + in_a_block - 1) / in_a_block;
  return dim3(static_cast<unsigned>(groups < kBlocks ? groups : kBlocks));
}

// The smallest instance that takes so many rows.
template <typename Body>
auto with_rows(int64_t rows, const Body& body) {
  if (rows <= 1) return body(std::integral_constant<int, 1>());
  if (rows <= 2) return body(std::integral_constant<int, 2>());
  if (rows <= 4) return body(std::integral_constant<int, 4>());
  return body(std::integral_constant<int, 8>());
}

// Eight elements of a row of x from a multiple of 16 bytes on.
__device__ inline void load_eight(const void* row, int type, int64_t at, float (&out)[8]) {
  if (type == cuda::kBFloat16) return cuda::load_vector(static_cast<const __nv_bfloat16*>(row) + at, out);
  if (type == cuda::kFloat16) return cuda::load_vector(static_cast<const __half*>(row) + at, out);
  float half[4];
  for (int part = 0; part < 2; ++part) {
    cuda::load_vector(static_cast<const float*>(row) + at + 4 * part, half);
    for (int i = 0; i < 4; ++i) out[4 * part + i] = half[i];
  }
}
__device__ inline const void* row_of(const Linear& l, int64_t row) {
  return static_cast<const char*>(l.x) + row * l.x_stride * (l.x_dtype == cuda::kFloat32 ? 4 : 2);
}

__device__ inline float activated(float y, int activation) {
  if (activation == kRelu) return y > 0.0f || y != y ? y : 0.0f;
  if (activation == kGelu) return 0.5f * y * (1.0f + erff(y * 0.70710678118654752f));
  if (activation == kSilu) return y / (1.0f + expf(-y));
  return y;
}

// Which weight rows a warp has: kColumns neighbours, or for kSwiglu half as many gates and the rows that they belong to.
template <int kColumns>
struct Columns {
  int64_t first, outputs;
  bool paired;
  __device__ Columns(const Linear& l, int64_t group)
      : first(group * (l.activation == kSwiglu ? kColumns / 2 : kColumns)), outputs(l.outputs), paired(l.activation == kSwiglu) {}
  __device__ int64_t row(int column) const {
    const int64_t found = paired ? first + column % (kColumns / 2) + (column >= kColumns / 2 ? outputs / 2 : 0) : first + column;
    return found < outputs ? found : outputs - 1;  // rows behind the last are read and dropped
  }
};

// Sums of the block's warps [warps][kColumns][kRows] in `sums` to the result: `value(sum of the parts, row of x, weight row)` is what the activation
// is applied to. `group` is the block's first group of columns.
template <int kColumns, int kRows, typename T, typename Value>
__device__ void finish(const Linear& l, const T* sums, int64_t group, int shared_by, const Value& value) {
  const int slots = kWarps / shared_by, index = static_cast<int>(threadIdx.x);
  const bool paired = l.activation == kSwiglu;
  const int64_t width = paired ? l.outputs / 2 : l.outputs;
  const auto sum_of = [&](int slot, int column, int m) {
    T sum = sums[(slot * shared_by * kColumns + column) * kRows + m];
    for (int part = 1; part < shared_by; ++part) sum += sums[((slot * shared_by + part) * kColumns + column) * kRows + m];
    return sum;
  };
  if (index >= slots * kColumns * kRows) return;
  const int slot = index / (kColumns * kRows), column = index / kRows % kColumns, m = index % kRows;
  const Columns<kColumns> columns(l, group + slot);
  const int64_t to = columns.first + column;
  if (m >= l.rows || to >= width || (paired && column >= kColumns / 2)) return;
  float y = value(sum_of(slot, column, m), m, to);
  if (paired) y = activated(y, kSilu) * value(sum_of(slot, column + kColumns / 2, m), m, to + width);
  else y = activated(y, l.activation);
  cuda::store_as(y, l.out, l.out_dtype, m * width + to);
}

}  // namespace cvmk::gemm
