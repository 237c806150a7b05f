// Attention over caches for one instruction-set level.
#include "cached/attention.inl"

CVMK_KERNELS(cached) = {{attention_scratch, run_attention}, {append_scratch, run_append}, {copy_scratch, run_copy}};
