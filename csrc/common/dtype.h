// The types of a tensor's elements: one enumeration for kernels and bindings, on every device.
#pragma once

#include <stdint.h>

#include "common/inline.h"

namespace cvmk {

// Floating types first: what is below kFloat64 a kernel computes in float32.
enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kInt32 = 4, kInt64 = 5, kInt8 = 6, kUint8 = 7, kInt16 = 8, kNoDtype = -1 };

// Bytes of an element.
CVMK_ANYWHERE constexpr int64_t size_of(Dtype dtype) {
  return dtype == kFloat32 || dtype == kInt32 ? 4 : dtype == kFloat64 || dtype == kInt64 ? 8 : dtype == kInt8 || dtype == kUint8 ? 1 : 2;
}

// The type that DLPack (github.com/dmlc/dlpack) describes by its code and the bits of an element; kNoDtype where it is none of these.
CVMK_INLINE constexpr Dtype dtype_of_dlpack(int code, int bits, int lanes) {
  constexpr int kSigned = 0, kUnsigned = 1, kFloating = 2, kBrain = 4;
  if (lanes != 1) return kNoDtype;
  if (code == kFloating) return bits == 32 ? kFloat32 : bits == 16 ? kFloat16 : bits == 64 ? kFloat64 : kNoDtype;
  if (code == kBrain) return bits == 16 ? kBFloat16 : kNoDtype;
  if (code == kSigned) return bits == 64 ? kInt64 : bits == 32 ? kInt32 : bits == 8 ? kInt8 : bits == 16 ? kInt16 : kNoDtype;
  return code == kUnsigned && bits == 8 ? kUint8 : kNoDtype;
}

// Its name as PyTorch and NumPy have it.
CVMK_INLINE constexpr const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64", "int32", "int64", "int8", "uint8", "int16"};
  return dtype == kNoDtype ? "another type" : kNames[dtype];
}

// One element of integers, kInt32 or kInt64.
CVMK_ANYWHERE int64_t integer_at(const void* data, Dtype dtype, int64_t index) {
  return dtype == kInt64 ? static_cast<const int64_t*>(data)[index] : static_cast<const int32_t*>(data)[index];
}

}  // namespace cvmk
