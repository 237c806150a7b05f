// int8_linear for up to 8 rows: quantises the rows in every block, multiplies four products at a time (dp4a), scales, adds the bias and applies the
// activation. The integers are those of the law in cvmk/ops/int8_linear.py, bit for bit.
#include <type_traits>

#include "gemm/cuda_rows.cuh"

namespace cvmk::gemm {
namespace {

using namespace cvmk::cuda;

// The greatest magnitude as the bits of a float without sign: NaN is above infinity, infinity above every number.
struct MaxBits {
  static __device__ unsigned nothing() { return 0; }
  static __device__ unsigned of(unsigned a, unsigned b) { return a > b ? a : b; }
};

// x / smooth_scale, as the law rounds it.
__device__ inline void load_smoothed(const CudaInt8& p, int64_t row, int64_t k, float (&out)[8]) {
  load_eight(row_of(p.linear, row), p.linear.x_dtype, k, out);
  if (p.smooth_scale == nullptr) return;
  for (int i = 0; i < 8; ++i) out[i] = __fmul_rn(out[i], __fdiv_rn(1.0f, load_as(p.smooth_scale, p.smooth_dtype, k + i)));
}

// Rows of x as int8 [kRows, inputs] in `values`; amax[m] is the greatest magnitude of row m. Rows that are not there are zeros.
template <int kRows>
__device__ void quantize(const CudaInt8& p, int8_t* values, float* amax, unsigned* scratch) {
  const Linear& l = p.linear;
  const int64_t step = kThreads * 8, begin = static_cast<int64_t>(threadIdx.x) * 8;
  const int rows = static_cast<int>(l.rows);
  unsigned greatest[kRows] = {};
  float x[8];
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    if (m >= rows) break;
    for (int64_t k = begin; k < l.inputs; k += step) {
      load_smoothed(p, m, k, x);
      for (int i = 0; i < 8; ++i) greatest[m] = MaxBits::of(greatest[m], __float_as_uint(fabsf(x[i])));
    }
  }
  block_reduce<MaxBits>(greatest, scratch);
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    const unsigned bits = MaxBits::of(greatest[m], __float_as_uint(0x1p-100f));
    const float inverse = __fdiv_rn(127.0f, __uint_as_float(bits));
    const bool finite = bits < 0x7F800000u && m < rows;
    if (threadIdx.x == 0) amax[m] = __uint_as_float(bits);
    for (int64_t k = begin; k < l.inputs; k += step) {
      int8_t q[8] = {};
      if (finite) {
        load_smoothed(p, m, k, x);
        for (int i = 0; i < 8; ++i) {
          const int value = __float2int_rn(__fmul_rn(x[i], inverse));
          q[i] = static_cast<int8_t>(value < -127 ? -127 : value > 127 ? 127 : value);
        }
      }
      memcpy(values + m * l.inputs + k, q, 8);
    }
  }
  __syncthreads();
}

constexpr int kColumns = kMostColumns;

template <int kRows>
__global__ void __launch_bounds__(kThreads, 2) int8_rows(const CudaInt8 p, int shared_by) {
  const Linear& l = p.linear;
  int* const sums = shared_memory<int>();  // [warps][kColumns][kRows]; scratch of the reduction before
  float* const amax = reinterpret_cast<float*>(sums + kWarps * kMostColumns * kMostRows);
  int8_t* const x = reinterpret_cast<int8_t*>(amax + kMostRows);
  quantize<kRows>(p, x, amax, reinterpret_cast<unsigned*>(sums));

  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32), slots = kWarps / shared_by;
  const int64_t width = l.activation == kSwiglu ? l.outputs / 2 : l.outputs, in_a_group = l.activation == kSwiglu ? kColumns / 2 : kColumns;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * slots; group * in_a_group < width; group += static_cast<int64_t>(gridDim.x) * slots) {
    const Columns<kColumns> columns(l, group + warp / shared_by);
    const int8_t* weight[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) weight[c] = p.weight + columns.row(c) * l.inputs;
    int found[kColumns][kRows] = {};
    for (int64_t k = (warp % shared_by * 32 + lane) * 16; k < l.inputs; k += shared_by * 512) {
      uint4 w[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) w[c] = __ldg(reinterpret_cast<const uint4*>(weight[c] + k));
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const uint4 v = *reinterpret_cast<const uint4*>(x + m * l.inputs + k);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          found[c][m] = __dp4a(static_cast<int>(w[c].x), static_cast<int>(v.x), found[c][m]);
          found[c][m] = __dp4a(static_cast<int>(w[c].y), static_cast<int>(v.y), found[c][m]);
          found[c][m] = __dp4a(static_cast<int>(w[c].z), static_cast<int>(v.z), found[c][m]);
          found[c][m] = __dp4a(static_cast<int>(w[c].w), static_cast<int>(v.w), found[c][m]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const int sum = __reduce_add_sync(kAllLanes, found[c][m]);
        if (lane == 0) sums[(warp * kColumns + c) * kRows + m] = sum;
      }
    __syncthreads();
    finish<kColumns, kRows>(l, sums, group, shared_by, [&](int sum, int m, int64_t n) {
      const float y = __fmul_rn(__fmul_rn(static_cast<float>(sum), __fdiv_rn(amax[m], 127.0f)), l.scales[n]);
      return l.bias == nullptr ? y : __fadd_rn(y, load_as(l.bias, l.bias_dtype, n));
    });
    __syncthreads();
  }
}

}  // namespace

int64_t cuda_int8_shared(int64_t rows, int64_t inputs) {
  const int64_t instance = with_rows(rows, [](auto n) { return static_cast<int64_t>(decltype(n)::value); });
  return (kWarps * kMostColumns * kMostRows + kMostRows) * 4 + instance * inputs;
}

cudaError_t cuda_int8_rows(const CudaInt8& p, cudaStream_t stream) {
  const Linear& l = p.linear;
  if (l.rows == 0) return cudaSuccess;
  const int shared_by = warps_of_row(l.outputs, l.inputs);
  return with_rows(l.rows, [&](auto n) {
    return launch(int8_rows<decltype(n)::value>, grid_for(l.outputs, shared_by, kColumns), kThreads, static_cast<size_t>(cuda_int8_shared(l.rows, l.inputs)), stream, p, shared_by);
  });
}

}  // namespace cvmk::gemm
