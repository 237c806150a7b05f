// int4_linear for up to 8 rows. A lane's 16 bytes are 16 neighbouring inputs of a block of 128 and the 16 that lie 64 behind them, each 16 in
// one group: it adds x (q - zero) over them and multiplies by the scale once, in float throughout. Nibbles become floats by setting them into
// the mantissa of 2^23.
#include <type_traits>

#include "gemm/cuda_rows.cuh"

namespace cvmk::gemm {
namespace {

using namespace cvmk::cuda;

constexpr int kBlock = 128, kRun = 16;    // inputs of a block, and of those that stand together in a lane's 16 bytes
constexpr int kLoads = 4;                 // of 16 bytes in a block
constexpr unsigned kMagic = 0x4B000000u;  // 2^23

// Where float `k` of a row of x is kept, k a multiple of 4: four numbers stay together, and those four of the eight lanes that read shared memory
// at one time lie in different banks.
__device__ __forceinline__ int place_of(int k) {
  const int run = k / kRun, turn = (run >> 1 & 1) | (run >> 2 & 2);
  return run * kRun + ((k % kRun / 4) ^ turn) * 4;
}
__host__ __device__ inline int64_t padded(int64_t inputs) { return (inputs + kBlock - 1) / kBlock * kBlock; }

// Weight rows of a warp: as many as there are registers for.
__host__ __device__ constexpr int columns_for(int rows) { return rows > 2 ? 2 : kMostColumns; }

// Rows of x in the order of the stored inputs, as floats [kRows, whole blocks]; what is not there is zeros.
template <int kRows>
__device__ void stage(const CudaInt4& p, float* x) {
  const Linear& l = p.linear;
  const int length = static_cast<int>(padded(l.inputs)), inputs = static_cast<int>(l.inputs);
  for (int m = 0; m < kRows; ++m) {
    const void* const row = row_of(l, m < l.rows ? m : 0);
    for (int k = static_cast<int>(threadIdx.x) * 8; k < length; k += kThreads * 8) {
      float values[8] = {};
      if (m < l.rows && k < inputs) {
        if (p.order == nullptr) load_eight(row, l.x_dtype, k, values);
        else
          for (int i = 0; i < 8; ++i) values[i] = load_as(row, l.x_dtype, p.order[k + i]);
      }
      float* const to = x + static_cast<int64_t>(m) * length;
      *reinterpret_cast<float4*>(to + place_of(k)) = {values[0], values[1], values[2], values[3]};
      *reinterpret_cast<float4*>(to + place_of(k + 4)) = {values[4], values[5], values[6], values[7]};
    }
  }
  __syncthreads();
}

// sums[c][m] += scale of the group times sum x (q - zero), over the run that begins at input k; kHigh: the high nibbles of w.
template <bool kHigh, int kColumns, int kRows>
__device__ __forceinline__ void add_run(const CudaInt4& p, const int64_t (&rows)[kColumns], const uint4 (&w)[kColumns], const float* x, int length, int k, int shift,
                                        float (&sums)[kColumns][kRows]) {
  if (k >= p.linear.inputs) return;  // the last block may end before its high nibbles
  float scale[kColumns], base[kColumns];  // base: what a nibble in the mantissa of 2^23 is above q - zero
  float part[kColumns][kRows] = {};
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t at = (k >> shift) * p.linear.outputs + rows[c];
    scale[c] = __ldg(p.linear.scales + at);
    base[c] = 8388608.0f + (p.zeros == nullptr ? 8.0f : static_cast<float>(p.zeros[at]));
  }
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float q[kColumns][4];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const unsigned bits = word == 0 ? w[c].x : word == 1 ? w[c].y : word == 2 ? w[c].z : w[c].w;
#pragma unroll
      for (int i = 0; i < 4; ++i) q[c][i] = __uint_as_float((bits >> (8 * i + (kHigh ? 4 : 0)) & 15u) | kMagic) - base[c];
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const float4 v = *reinterpret_cast<const float4*>(x + m * length + place_of(k + 4 * word));
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        part[c][m] += v.x * q[c][0];
        part[c][m] += v.y * q[c][1];
        part[c][m] += v.z * q[c][2];
        part[c][m] += v.w * q[c][3];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
#pragma unroll
    for (int m = 0; m < kRows; ++m) sums[c][m] += scale[c] * part[c][m];
}

template <int kRows>
__global__ void __launch_bounds__(kThreads, 2) int4_rows(const CudaInt4 p, int shared_by) {
  constexpr int kColumns = columns_for(kRows);
  const Linear& l = p.linear;
  float* const sums = shared_memory<float>();  // [warps][kColumns][kRows]
  float* const x = sums + kWarps * kMostColumns * kMostRows;
  stage<kRows>(p, x);

  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32), slots = kWarps / shared_by;
  const int64_t width = l.activation == kSwiglu ? l.outputs / 2 : l.outputs, in_a_group = l.activation == kSwiglu ? kColumns / 2 : kColumns;
  const int length = static_cast<int>(padded(l.inputs)), loads = length / kBlock * kLoads, shift = p.group == 32 ? 5 : p.group == 64 ? 6 : 7;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * slots; group * in_a_group < width; group += static_cast<int64_t>(gridDim.x) * slots) {
    const Columns<kColumns> columns(l, group + warp / shared_by);
    float found[kColumns][kRows] = {};
    int64_t rows[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) rows[c] = columns.row(c);
    for (int load = warp % shared_by * 32 + lane; load < loads; load += shared_by * 32) {
      uint4 w[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) w[c] = __ldg(reinterpret_cast<const uint4*>(p.weight) + rows[c] * loads + load);
      const int k = load / kLoads * kBlock + load % kLoads * kRun;
      add_run<false>(p, rows, w, x, length, k, shift, found);
      add_run<true>(p, rows, w, x, length, k + kBlock / 2, shift, found);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const float sum = warp_reduce<Sum>(found[c][m]);
        if (lane == 0) sums[(warp * kColumns + c) * kRows + m] = sum;
      }
    __syncthreads();
    finish<kColumns, kRows>(l, sums, group, shared_by, [&](float sum, int, int64_t n) { return l.bias == nullptr ? sum : sum + load_as(l.bias, l.bias_dtype, n); });
    __syncthreads();
  }
}

}  // namespace

int64_t cuda_int4_shared(int64_t rows, int64_t inputs) {
  const int64_t instance = with_rows(rows, [](auto n) { return static_cast<int64_t>(decltype(n)::value); });
  return (kWarps * kMostColumns * kMostRows + instance * padded(inputs)) * 4;
}

cudaError_t cuda_int4_rows(const CudaInt4& p, cudaStream_t stream) {
  const Linear& l = p.linear;
  if (l.rows == 0) return cudaSuccess;
  const int shared_by = warps_of_row(l.outputs, padded(l.inputs) / 2);
  return with_rows(l.rows, [&](auto n) {
    constexpr int kRows = decltype(n)::value;
    return launch(int4_rows<kRows>, grid_for(l.outputs, shared_by, columns_for(kRows)), kThreads, static_cast<size_t>(cuda_int4_shared(l.rows, l.inputs)), stream, p, shared_by);
  });
}

}  // namespace cvmk::gemm
