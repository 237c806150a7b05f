// Causal convolutions for one instruction-set level.
#include "conv/backward.inl"
#include "conv/forward.inl"
#include "conv/update.inl"

CVMK_KERNELS(conv) = {{forward_scratch, run_forward}, {backward_scratch, run_backward}, {update_scratch, run_update}};
