// Embeddings for one instruction-set level.
#include "embed/backward.inl"
#include "embed/forward.inl"

CVMK_KERNELS(embed) = {{forward_scratch, run_forward}, {backward_scratch, run_backward}};
