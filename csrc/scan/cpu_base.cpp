#define CVMK_LEVEL base
#include "scan/kernels.inl"
