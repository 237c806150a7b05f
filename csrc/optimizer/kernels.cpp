// Steps of optimisers for one instruction-set level.
#include "optimizer/adamw.inl"

CVMK_KERNELS(optimizer) = {{adamw_scratch, run_adamw}};
