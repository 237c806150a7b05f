// The largest of log-softmax for one instruction-set level.
#include "vocabulary/top_k.inl"

CVMK_KERNELS(vocabulary) = {{top_k_scratch, run_top_k}};
