// What the distillation-loss kernels are given. No torch, no STL: kernel files for one instruction set include this.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/kernel.h"

namespace cvmk {
namespace distill {

enum Divergence { kForwardKl = 0, kReverseKl = 1, kJs = 2, kSkewKl = 3, kSkewReverseKl = 4 };

// What a row's loss is made of; the formulas are derived in cvmk/ops/kd_loss.py.
struct Terms {
  float temperature;
  int divergence;
  float mixture;
  float smoothing;
};

// Rows of logits: row i begins at data + i * stride elements.
struct Logits {
  const void* data;  // null: there is no teacher
  int64_t stride;
  Dtype dtype;
  bool lowered = false;  // float32 that is rounded to bfloat16 where it is read
};

// The statistics of row i, [5, rows]: log-sum-exp of the student at temperature 1, at T, of the teacher at T, the divergence's row
// reduction R, and the count V' of entries that are not -inf (0 without label smoothing).
struct Rows {
  Logits student, teacher;
  const int64_t* target;  // -1: the row counts nothing and is not read
  int64_t rows, vocabulary;
  float* stats;
  Terms terms;
};

// Divergence (without T^2) and cross-entropy of every row, 0 for rows that do not count, and their statistics.
struct LossPass {
  Rows in;
  float* kd;
  float* ce;
};

// gradient = kd_scale * q (g - sum q g) + ce_scale * dCE/dz, 0 for rows that do not count. A scale of 0 leaves its part out.
struct GradientPass {
  Rows in;  // with `kd` the statistics are written, else read
  float kd_scale, ce_scale;
  bool with_kd, with_ce;
  void* gradient;           // rows of the student's type; may be the student's own
  int64_t gradient_stride;  // elements from one of them to the next
  float* kd;                // as in LossPass: a row's losses are made first, and its gradient while it is in the cache; or null, both
  float* ce;
};

// to[i] = factor * from[i], of `dtype`.
struct ScalePass {
  const float* from;
  void* to;
  Dtype dtype;
  int64_t count;
  float factor;
};

// One output layer: hidden [., width] rows of `hidden_stride` elements, weight [vocabulary, width] of rows of `weight_stride`, and a bias
// [vocabulary] or null, all of `dtype`; `lowered` as of Logits.
struct Layer {
  const void* hidden;  // null: there is no teacher
  const void* weight;
  const void* bias;
  int64_t width, hidden_stride, weight_stride;
  Dtype dtype;
  bool lowered;
};

// linear_kd_loss. Results of the rows named in `index` only; outputs of other rows are not touched.
struct LinearPass {
  Layer student, teacher;
  const int64_t* index;   // [count] rows that count
  const int64_t* target;  // [rows]
  int64_t count, rows, vocabulary;
  Terms terms;
  bool with_kd, with_ce;  // parts of the gradient
  float kd_scale, ce_scale;
  float* stats;  // [5, rows]
  float* kd;     // [rows]
  float* ce;
  float* d_hidden;  // [rows, width], contiguous; null where it is not wanted, as the next two
  float* d_weight;  // [vocabulary, width]
  float* d_bias;    // [vocabulary]
  bool pairs;       // whether the avx512 level may multiply bfloat16 in pairs (AVX512_BF16)
};

struct Kernels {
  Kernel<LossPass> losses;
  Kernel<GradientPass> gradients;
  Kernel<ScalePass> scale;
  Kernel<LinearPass> linear;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

}  // namespace distill
}  // namespace cvmk
