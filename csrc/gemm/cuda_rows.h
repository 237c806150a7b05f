// The CUDA kernels of the quantised linears for few rows of x. Weights are in the layouts of the Triton kernels: int8 [outputs, inputs], and
// "triton_int4" of cvmk/ops/triton/int4_linear.py.
#pragma once

#include <cuda_runtime.h>

#include "gemm/params.h"

namespace cvmk::gemm {

constexpr int kMostRows = 8;

struct CudaLinear {
  const void* x;     // [rows, inputs], rows x_stride elements apart, each at a multiple of 16 bytes
  int64_t x_stride;
  void* out;         // [rows, columns], contiguous; columns is outputs, half of them for kSwiglu
  const void* bias;  // [outputs] or null
  const float* scales;
  int64_t rows, inputs, outputs;
  int x_type, out_type, bias_type, activation;  // types as in common/cuda_types.cuh, Activation of params.h
};

struct CudaInt8 {
  CudaLinear linear;         // scales [outputs]
  const int8_t* weight;      // [outputs, inputs] at a multiple of 16 bytes; inputs a multiple of 16
  const void* smooth_scale;  // [inputs] or null
  int smooth_type;
};

struct CudaInt4 {
  CudaLinear linear;      // scales [inputs / group, outputs]
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
