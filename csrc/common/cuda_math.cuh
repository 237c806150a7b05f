// Functions of one number, and sums and maxima over a warp or a block. Every reduction is a fixed tree.
#pragma once

#include <cuda_runtime.h>

#include <float.h>
#include <math.h>

#include "common/cuda_launch.cuh"

namespace cvmk::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x: one instruction on the device, within 2 units in the last place; results below the smallest normal number are 0.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
// log(1 + e^x); x itself above 20, as PyTorch has it.
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

struct Sum {
  static __device__ float nothing() { return 0.0f; }
  static __device__ float of(float a, float b) { return a + b; }
  static __device__ double of(double a, double b) { return a + b; }
};
struct Max {
  static __device__ float nothing() { return -FLT_MAX; }
  static __device__ float of(float a, float b) { return fmaxf(a, b); }
};

// Every lane gets the reduction over the warp.
template <typename Operation, typename T>
__device__ T warp_reduce(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = Operation::of(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// Every thread gets the reductions of kCount values each over the block; `scratch` [32 * kCount] is free to be written when the call begins.
template <typename Operation, int kCount, typename T>
__device__ void block_reduce(T (&values)[kCount], T* scratch) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = warp_reduce<Operation>(values[i]);
    if (lane == 0) scratch[i * 32 + warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = warp_reduce<Operation>(lane < warps ? scratch[i * 32 + lane] : static_cast<T>(Operation::nothing()));
  __syncthreads();
}

}  // namespace cvmk::cuda
