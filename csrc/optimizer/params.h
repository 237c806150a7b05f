// Steps of optimisers over flat memory. No torch, no STL: kernel files for one instruction set include this.
#pragma once

#include <stdint.h>

#include "common/kernel.h"

namespace cvmk::optimizer {

// AdamW (Loshchilov & Hutter 2019), element by element, float32, [count]: with g = gradient * scale
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  w = keep w - rate m / (sqrt(v) * root + epsilon)
// where keep = 1 - learning rate * decay, and rate and root hold the corrections of the moments' bias. cvmk/ops/adamw.py derives them.
struct AdamW {
  float *weight, *first, *second;
  const float* gradient;
  int64_t count;
  float scale, keep, beta1, rest1, beta2, rest2, rate, root, epsilon;
};

struct Kernels {
  Kernel<AdamW> adamw;
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

}  // namespace cvmk::optimizer
