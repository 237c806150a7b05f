// Rows of the residual stream and their norm: what stands between two sublayers.
#pragma once

#include <stdint.h>

#include "common/kernel.h"
#include "common/view.h"

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

// What both passes of training share, all of floating types but float64: rows [rows, n], and dropout of the branch (common/dropout.h; one group, rows and columns counted from 0).
struct Shape {
  int64_t rows, n;
  Elements weight;  // [n]
  float keep_factor;
  uint32_t dropout_key, dropout_limit;
  bool rms;
};

// sum = x + dropout(branch), rounded to its type, and normed = norm(sum) with the statistics of each row. Without a branch there is no sum, and normed = norm(x).
struct ResidualForward {
  Shape shape;
  Elements x, branch, bias, sum, normed;  // bias [n] or null
  float* stats;                           // [2, rows]: means (0 for rms), then 1 / sqrt(variance + epsilon); or null
  float epsilon;
};

// The gradients of x and branch, those of weight and bias summed over the rows; each null where it is not wanted. cvmk/ops/residual_norm.py has the formulas.
struct ResidualBackward {
  Shape shape;
  Elements sum;                    // x, where there is no branch
  Elements grad_sum, grad_normed;  // null: 0
  Elements dx, dbranch, dweight, dbias;
  const float* stats;
};

struct Kernels {
  Kernel<Residual> residual;
  Kernel<ResidualForward> forward;
  Kernel<ResidualBackward> backward;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

}  // namespace cvmk::norm
