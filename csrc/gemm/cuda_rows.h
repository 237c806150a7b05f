// The CUDA kernels of the quantised linears for few rows of x. Weights are in the layouts of the Triton kernels: int8 [outputs, inputs], and
// "triton_int4" of cvmk/ops/triton/int4_linear.py.
#pragma once

#include <cuda_runtime.h>

#include "gemm/params.h"

namespace cvmk::gemm {

constexpr int kMostRows = 8;

// Rows of x begin at multiples of 16 bytes, inputs are a multiple of 16; results are of the types of x.
struct CudaInt8 {
  Linear linear;             // scales [outputs]
  const int8_t* weight;      // [outputs, inputs] at a multiple of 16 bytes
  const void* smooth_scale;  // [inputs] or null
  Dtype smooth_dtype;
};

struct CudaInt4 {
  Linear linear;          // scales [inputs / group, outputs]
  const uint8_t* weight;  // [outputs, blocks of 128 inputs, 64]: byte j has input j in its low and input 64 + j in its high nibble
  const uint8_t* zeros;   // [inputs / group, outputs] or null: then 8
  const int32_t* order;   // [inputs] or null
  int64_t group;          // 32, 64 or 128
};

// Bytes of shared memory that a call needs; a device has 160 KiB and more.
int64_t cuda_int8_shared(int64_t rows, int64_t inputs);
int64_t cuda_int4_shared(int64_t rows, int64_t inputs);

cudaError_t cuda_int8_rows(const CudaInt8& p, cudaStream_t stream);
cudaError_t cuda_int4_rows(const CudaInt4& p, cudaStream_t stream);

}  // namespace cvmk::gemm
