// Residual sums and norms for one instruction-set level.
#include "norm/backward.inl"
#include "norm/forward.inl"
#include "norm/residual.inl"

CVMK_KERNELS(norm) = {{residual_scratch, run_residual}, {forward_scratch, run_forward}, {backward_scratch, run_backward}};
