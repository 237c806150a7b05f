// Rows of the residual stream and their norm: what stands between two sublayers.
#pragma once

#include <stdint.h>

#include "common/kernel.h"

namespace cvmk::norm {

// x += branch where there is one, then out = norm(x), row by row. [rows, n], contiguous, float32.
// LayerNorm (Ba et al. 2016): (x - mean) / sqrt(variance + epsilon) * weight + bias; RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + epsilon) * weight.
struct Residual {
  float* x;
  const float* branch;  // or null
  float* out;
  const float *weight, *bias;  // [n]; bias may be null
  int64_t rows, n;
  float epsilon;
  bool rms;
};

struct Kernels {
  Kernel<Residual> residual;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

}  // namespace cvmk::norm
