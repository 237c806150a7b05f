// What is asked of rows of logits, for one instruction-set level.
#include "vocabulary/best.inl"

CVMK_KERNELS(vocabulary) = {take, merge, normaliser};
