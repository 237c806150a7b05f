// Residual sums and norms for one instruction-set level.
#include "norm/residual.inl"

CVMK_KERNELS(norm) = {{residual_scratch, run_residual}};
