// What one call of fused_linear works on: y = dropout(activation(x W^T + b)) and its gradients. Sizes and strides count elements; the last
// dimension of every matrix is contiguous.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/kernel.h"

namespace cvmk::linear {

enum Activation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3, kSwiglu = 4 };  // as csrc/gemm/params.h numbers them

// Rows of numbers that are read as floats: each rounded to `rounds_to` first where that is not its own type (kFloat32: as it is).
struct Matrix {
  const void* data;
  int64_t stride;
  Dtype dtype, rounds_to;
};

// A contiguous matrix or vector that is written to; null where it is not wanted.
struct Written {
  void* data;
  Dtype dtype;
};

struct Linear {
  int64_t rows, inputs, outputs;  // outputs: rows of the weight, those of both halves [gate, up] for swiglu
  Activation activation;
  Matrix x, weight;  // [rows, inputs], [outputs, inputs]
  const void* bias;  // [outputs], or null
  Dtype bias_dtype;
  // What the backward pass needs of the activation, or null. kRelu: bits [rows, outputs / 8 rounded up], bit n % 8 of byte n / 8 says that the
  // pre-activation is not 0 or less. The others: the pre-activation [rows, outputs] in the result's type.
  void* kept;
  Dtype dtype;         // of the result and its gradient; bfloat16 operands are multiplied in pairs where the processor can
  float keep_factor;   // 1 / (1 - dropout_p)
  uint32_t dropout_key, dropout_limit;  // common/dropout.h
  bool pairs;          // whether bfloat16 operands are multiplied in pairs (AVX512_BF16, AMX); kernels_for sets it
};

struct Forward {
  Linear linear;
  void* out;  // [rows, outputs], half as wide for swiglu
};

struct Backward {
  Linear linear;
  const void* grad;  // of the result
  int64_t grad_stride;
  Written dx, d_weight, d_bias;
};

struct Kernels {
  Kernel<Forward> forward;
  Kernel<Backward> backward;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();
// For this call, whose `pairs` it sets.
const Kernels& kernels_for(Linear& linear);

}  // namespace cvmk::linear
