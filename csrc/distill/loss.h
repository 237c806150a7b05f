// kd_loss and linear_kd_loss as wholes: the kernels, and around them what is done once a call: targets are looked at, sums over the rows and the
// scales of gradients are made in double precision. Scratch memory is taken from the blocks that are kept (common/scratch.h).
#pragma once

#include <cstdint>

#include "common/team.h"
#include "distill/params.h"

namespace cvmk::distill {

// What both losses have in common. The target holds kInt32 or kInt64.
struct Loss {
  const void* target;
  Dtype target_dtype;
  std::int64_t rows, vocabulary, ignore_index;
  Terms terms;
  double alpha;
  float* stats;  // [5, rows], as Rows in params.h
};

// One number each: the loss, T^2 D, CE and what they were divided by. `loss` null: none is wanted.
struct Totals {
  float *loss, *kd, *ce, *divisor;
};

// The gradients of the first three, one number each, null where there is none.
struct Upstream {
  const float *loss, *kd, *ce;
};

// Gradients of the student's hidden states, weight and bias, contiguous; null where they are not wanted.
struct LinearGradients {
  float *hidden, *weight, *bias;
};

// All of them throw std::invalid_argument for a target that is neither in the vocabulary nor ignore_index, and std::bad_alloc.

// Losses, statistics and, with a place for it, the gradient of the loss by itself: rows of the student's type, `gradient_stride` elements apart,
// which may be the student's own. `normalizer` null: the number of rows that count, at least 1.
void kd_loss(const Loss& call, const Logits& student, const Logits& teacher, const float* normalizer, const Totals& totals, void* gradient,
             std::int64_t gradient_stride, const Team& team);

// The gradient [rows, vocabulary] from the statistics; `divisor` as kd_loss left it.
void kd_loss_gradient(const Loss& call, const Logits& student, const Logits& teacher, const Upstream& upstream, const float* divisor, void* gradient,
                      const Team& team);

// Statistics, the totals, and gradients by `upstream` over `divisor`. Rows that do not count get zeros.
void linear_kd_loss(const Loss& call, const Layer& student, const Layer& teacher, const float* normalizer, const Upstream& upstream, const float* divisor,
                    const Totals& totals, const LinearGradients& gradients, const Team& team);

}  // namespace cvmk::distill
