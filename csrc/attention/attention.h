// Attention on the best instruction set of this processor, capped by CVMK_CPU_ISA.
#pragma once

#include "attention/params.h"

namespace cvmk::attention {

// out and lse from q, k, v. Returns a Status.
int forward(const Params& params);

// The gradients whose matrices are given, from out, lse and the gradients of both; then the bias gradient, where bias.grad is given.
int backward(const Params& params);

}  // namespace cvmk::attention
