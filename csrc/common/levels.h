// The kernels of a folder at each instruction-set level, and the one that is used.
//
// CMake compiles csrc/<folder>/kernels.cpp once for each level of the folder; it ends with CVMK_KERNELS (common/kernel.h).
// csrc/<folder>/dispatch.cpp is CVMK_LEVELS(<folder>) after the include of the struct cvmk::<folder>::Kernels, and defines
//
//     const Kernels& kernels(IsaLevel level);  // of this level, or of the next lower one that the folder has
//     const Kernels& kernels();                // of the processor's level, capped by CVMK_CPU_ISA
#pragma once

#include "common/cpu_features.h"

// CMake defines CVMK_HAVE_<level> for a dispatch.cpp whose folder has the level.
#if defined(CVMK_HAVE_avx2)
#define CVMK_AT_AVX2 &at_avx2
#else
#define CVMK_AT_AVX2 nullptr
#endif
#if defined(CVMK_HAVE_avx512)
#define CVMK_AT_AVX512 &at_avx512
#else
#define CVMK_AT_AVX512 nullptr
#endif
#if defined(CVMK_HAVE_amx)
#define CVMK_AT_AMX &at_amx
#else
#define CVMK_AT_AMX nullptr
#endif

#define CVMK_LEVELS(folder)                                                                                   \
  namespace cvmk::folder {                                                                                    \
  extern const Kernels at_base, at_avx2, at_avx512, at_amx;                                                   \
  const Kernels& kernels(IsaLevel level) {                                                                    \
    static constexpr const Kernels* kLevels[] = {&at_base, CVMK_AT_AVX2, CVMK_AT_AVX512, CVMK_AT_AMX};        \
    int at = static_cast<int>(level);                                                                         \
    while (kLevels[at] == nullptr) --at;                                                                      \
    return *kLevels[at];                                                                                      \
  }                                                                                                           \
  const Kernels& kernels() { return kernels(dispatch_level()); }                                              \
  }
