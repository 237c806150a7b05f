#define CVMK_LEVEL avx512
#include "scan/kernels.inl"
