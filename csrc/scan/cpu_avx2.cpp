#define CVMK_LEVEL avx2
#include "scan/kernels.inl"
