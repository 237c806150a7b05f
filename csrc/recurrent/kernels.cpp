// Recurrences of decoding for one instruction-set level.
#include "recurrent/mamba.inl"
#include "recurrent/ssru.inl"

CVMK_KERNELS(recurrent) = {{no_scratch, run_ssru}, {no_scratch, run_conv}, {no_scratch, run_scan}};
