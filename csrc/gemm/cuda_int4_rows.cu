// int4_linear for up to 8 rows. A lane's 16 bytes are 32 neighbouring inputs, which lie in one group: it adds x (q - zero) over them and
// multiplies by the scale once, in float throughout. Nibbles become floats by setting them into the mantissa of 2^23.
#include <type_traits>

#include "gemm/cuda_rows.cuh"

namespace cvmk::gemm {
namespace {

using namespace cvmk::cuda;

constexpr int kInputs = 32;               // of a lane's load
constexpr int kPadded = kInputs + 4;      // floats between those of two lanes: eight lanes read 128 bytes from different banks
constexpr unsigned kMagic = 0x4B000000u;  // 2^23

// Weight rows of a warp: as many as there are registers for.
__host__ __device__ constexpr int columns_for(int rows) { return rows > 2 ? 2 : kMostColumns; }

// Rows of x in the order of the stored inputs, as floats [kRows, inputs / 32, 36]; rows that are not there are zeros.
template <int kRows>
__device__ void stage(const CudaInt4& p, float* x) {
  const CudaLinear& l = p.linear;
  const int64_t length = l.inputs / kInputs * kPadded;
  for (int m = 0; m < kRows; ++m) {
    const void* const row = row_of(l, m < l.rows ? m : 0);
    for (int64_t k = static_cast<int64_t>(threadIdx.x) * 8; k < l.inputs; k += kThreads * 8) {
      float values[8];
      if (p.order == nullptr) load_eight(row, l.x_type, k, values);
      else
        for (int i = 0; i < 8; ++i) values[i] = load_as(row, l.x_type, p.order[k + i]);
      float* const to = x + m * length + k / kInputs * kPadded + k % kInputs;
      for (int i = 0; i < 8; ++i) to[i] = m < l.rows ? values[i] : 0.0f;
    }
  }
  __syncthreads();
}

template <int kRows>
__global__ void __launch_bounds__(kThreads, 2) int4_rows(const CudaInt4 p, int shared_by) {
  constexpr int kColumns = columns_for(kRows);
  const CudaLinear& l = p.linear;
  float* const sums = shared_memory<float>();  // [warps][kColumns][kRows]
  float* const x = sums + kWarps * kMostColumns * kMostRows;
  stage<kRows>(p, x);

  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32), slots = kWarps / shared_by;
  const int64_t width = l.activation == kSwiglu ? l.outputs / 2 : l.outputs, in_a_group = l.activation == kSwiglu ? kColumns / 2 : kColumns;
  const int chunks = static_cast<int>(l.inputs / kInputs), length = chunks * kPadded, shift = p.group == 32 ? 0 : p.group == 64 ? 1 : 2;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * slots; group * in_a_group < width; group += static_cast<int64_t>(gridDim.x) * slots) {
    const Columns<kColumns> columns(l, group + warp / shared_by);
    float found[kColumns][kRows] = {};
    const uint4* weight[kColumns];
    int64_t first_group[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t row = columns.row(c);
      weight[c] = reinterpret_cast<const uint4*>(p.weight + row * (l.inputs / 2));
      first_group[c] = row * (chunks >> shift);
    }
    for (int chunk = warp % shared_by * 32 + lane; chunk < chunks; chunk += shared_by * 32) {
      uint4 w[kColumns];
      float scale[kColumns], base[kColumns];  // base: what a nibble in the mantissa of 2^23 is above q - zero
      float part[kColumns][kRows] = {};
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int64_t at = first_group[c] + (chunk >> shift);
        w[c] = __ldg(weight[c] + chunk);
        scale[c] = __ldg(l.scales + at);
        base[c] = 8388608.0f + (p.zeros == nullptr ? 8.0f : static_cast<float>(p.zeros[at]));
      }
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float q[kColumns][8];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const unsigned bits = word == 0 ? w[c].x : word == 1 ? w[c].y : word == 2 ? w[c].z : w[c].w;
#pragma unroll
          for (int i = 0; i < 8; ++i) q[c][i] = __uint_as_float((bits >> 4 * i & 15u) | kMagic) - base[c];
        }
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          const float4* const from = reinterpret_cast<const float4*>(x + m * length + chunk * kPadded + word * 8);
          const float4 low = from[0], high = from[1];
          const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
#pragma unroll
            for (int i = 0; i < 8; ++i) part[c][m] += values[i] * q[c][i];
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int m = 0; m < kRows; ++m) found[c][m] += scale[c] * part[c][m];
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const float sum = warp_reduce<Sum>(found[c][m]);
        if (lane == 0) sums[(warp * kColumns + c) * kRows + m] = sum;
      }
    __syncthreads();
    finish<kColumns, kRows>(l, sums, group, shared_by, [&](float sum, int, int64_t n) { return l.bias == nullptr ? sum : sum + load_as(l.bias, l.bias_type, n); });
    __syncthreads();
  }
}

}  // namespace

int64_t cuda_int4_shared(int64_t rows, int64_t inputs) {
  const int64_t instance = with_rows(rows, [](auto n) { return static_cast<int64_t>(decltype(n)::value); });
  return (kWarps * kMostColumns * kMostRows + instance * (inputs / kInputs) * kPadded) * 4;
}

cudaError_t cuda_int4_rows(const CudaInt4& p, cudaStream_t stream) {
  const CudaLinear& l = p.linear;
  if (l.rows == 0) return cudaSuccess;
  const int shared_by = warps_of_row(l.outputs, l.inputs / 2);
  return with_rows(l.rows, [&](auto n) {
    constexpr int kRows = decltype(n)::value;
    return launch(int4_rows<kRows>, grid_for(l.outputs, shared_by, columns_for(kRows)), kThreads, static_cast<size_t>(cuda_int4_shared(l.rows, l.inputs)), stream, p, shared_by);
  });
}

}  // namespace cvmk::gemm
