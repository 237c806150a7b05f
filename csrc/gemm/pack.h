// Weights of the quantised linears between their canonical form and the layout that the CPU kernels read. No torch: an engine packs with it.
//
// Canonical: int8 values [outputs, inputs] or, for 4 bits, uint8 [outputs, inputs / 2], the even input in the low nibble; scales [outputs] or
// [outputs, groups]; zeros uint8 [outputs, groups]. Packed: as gemm/params.h says at Int8Linear and Int4Linear.
#pragma once

#include <stdint.h>

namespace cvmk::gemm {

// Sizes of packed tensors in elements.
struct PackedSizes {
  int64_t values;  // bytes
  int64_t scales;  // floats
  int64_t zeros;   // bytes, where there are zeros
};
PackedSizes packed_int8_sizes(int64_t outputs, int64_t inputs);
PackedSizes packed_int4_sizes(int64_t outputs, int64_t inputs, int64_t groups);

void pack_int8(const int8_t* values, const float* scales, int64_t outputs, int64_t inputs, int8_t* to_values, float* to_scales);
void unpack_int8(const int8_t* values, const float* scales, int64_t outputs, int64_t inputs, int8_t* to_values, float* to_scales);

// zeros and to_zeros may both be null; inputs are even.
void pack_int4(const uint8_t* values, const float* scales, const uint8_t* zeros, int64_t outputs, int64_t inputs, int64_t groups, uint8_t* to_values,
               float* to_scales, uint8_t* to_zeros);
void unpack_int4(const uint8_t* values, const float* scales, const uint8_t* zeros, int64_t outputs, int64_t inputs, int64_t groups, uint8_t* to_values,
                 float* to_scales, uint8_t* to_zeros);

}  // namespace cvmk::gemm
