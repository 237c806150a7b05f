// Short causal convolutions of channels over time, and one step of them.
#pragma once

#include <stdint.h>

#include "common/kernel.h"
#include "common/view.h"

namespace cvmk::conv {

constexpr int64_t kMaxWidth = 8;

// With p = the `width` - 1 inputs before, or zeros, then x [batch, dim, length], which lies without gaps (or, channels last, [batch, length, dim] whose
// channels are neighbours):
//
//     out_t = act(bias + sum_k weight_k p_{t+k}),    last = the last width - 1 of p
//
// Of row b only the first lengths[b] inputs are real; the others count as 0, as do the results there. Reversed (channels last only), x is read from the
// last real input of each row to its first, and out is written so. cvmk/ops/causal_conv1d.py has the gradients.
struct Shape {
  int64_t batch, dim, length, width;  // width at most kMaxWidth
  const float *weight, *bias, *before;  // [dim, width]; [dim] or null; [batch, dim, width - 1] or null
  const void* lengths;                  // [batch] or null
  Dtype lengths_dtype;
  bool silu;
  bool channels_last = false, reverse = false;
  int64_t x_batch = 0, x_step = 0;  // strides of x in elements, where channels are last
};

struct Forward {
  Shape shape;
  Elements x, out, last;  // of one type
};

// Those of weight and bias are summed over rows in their order; each null where it is not wanted.
struct Backward {
  Shape shape;
  Elements x, grad_out, grad_last;  // the gradients null: 0
  Elements dx;  // without gaps, as out
  float *dweight, *dbias, *dbefore;
  int64_t grad_batch = 0, grad_step = 0;  // as of x
};

// state [batch, dim, width - 1] loses its oldest input and takes x [batch, dim] in.
struct Update {
  int64_t batch, dim, width;
  const float *weight, *bias;
  Elements state, x, y;
  bool silu;
};

struct Kernels {
  Kernel<Forward> forward;
  Kernel<Backward> backward;
  Kernel<Update> update;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

}  // namespace cvmk::conv
