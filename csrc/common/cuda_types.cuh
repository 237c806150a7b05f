// Element types of tensors on the device, and how 16 bytes of them come and go. Everything is computed in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdint.h>
#include <string.h>

#include "common/dtype.h"

namespace cvmk::cuda {

using cvmk::kBFloat16;
using cvmk::kFloat16;
using cvmk::kFloat32;

// Elements of 16 bytes.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& out) { out = __float2half_rn(x); }

// 16 aligned bytes of a tensor that nobody writes meanwhile.
template <typename T>
__device__ inline void load_vector(const T* from, float (&out)[kVector<T>]) {
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
  T values[kVector<T>];
  memcpy(values, &raw, 16);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) out[i] = widen(values[i]);
}

template <typename T>
__device__ inline void store_vector(const float (&values)[kVector<T>], T* to) {
  T narrowed[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) narrow(values[i], narrowed[i]);
  uint4 raw;
  memcpy(&raw, narrowed, 16);
  *reinterpret_cast<uint4*>(to) = raw;
}

// body(T{}) for the type that `type` names.
template <typename Body>
auto with_type(int type, const Body& body) {
  if (type == kBFloat16) return body(__nv_bfloat16{});
  if (type == kFloat16) return body(__half{});
  return body(float{});
}

// One element of a tensor whose type is known at run time only.
__device__ inline float load_as(const void* data, int type, int64_t index) {
  if (type == kBFloat16) return widen(static_cast<const __nv_bfloat16*>(data)[index]);
  if (type == kFloat16) return widen(static_cast<const __half*>(data)[index]);
  return static_cast<const float*>(data)[index];
}
__device__ inline void store_as(float value, void* data, int type, int64_t index) {
  if (type == kBFloat16) narrow(value, static_cast<__nv_bfloat16*>(data)[index]);
  else if (type == kFloat16) narrow(value, static_cast<__half*>(data)[index]);
  else static_cast<float*>(data)[index] = value;
}

}  // namespace cvmk::cuda
