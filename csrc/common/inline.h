// How small functions are written that several compilations for different instruction sets share: never a symbol of their own, for the
// linker would keep one of them for all, and that of a newer processor would crash an older one.
#pragma once

#if defined(__GNUC__)
#define CVMK_INLINE inline __attribute__((always_inline, unused))
#else
#define CVMK_INLINE inline
#endif

// The same for functions that CUDA kernels call too.
#if defined(__CUDACC__)
#define CVMK_ANYWHERE __host__ __device__ CVMK_INLINE
#else
#define CVMK_ANYWHERE CVMK_INLINE
#endif
