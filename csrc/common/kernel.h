// What a folder of kernels offers for one instruction-set level, and how its parts of scratch memory are taken. No torch, no STL.
#pragma once

#include <stdint.h>

#include "common/inline.h"
#include "common/sizes.h"
#include "common/team.h"

namespace cvmk {

enum class IsaLevel;  // common/cpu_features.h

// A kernel and the memory that it needs beside its arguments: `scratch` is scratch_bytes(p, team) uninitialised bytes that begin on a cache line
// and belong to the caller (common/scratch.h). Nothing fails.
template <typename Params>
struct Kernel {
  int64_t (*scratch_bytes)(const Params& p, const Team& team);
  void (*run)(const Params& p, char* scratch, const Team& team);
};

// Hands out parts of scratch memory, each on a cache line of its own; with base null it only counts. A plan that takes its parts from one arena
// is written once, for the count and for the run.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <typename T>
  CVMK_INLINE T* take(int64_t count) {
    T* part = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
};

}  // namespace cvmk

// How csrc/<folder>/kernels.cpp exports its struct cvmk::<folder>::Kernels for the level that CMake compiles it for:
//
//     CVMK_KERNELS(<folder>) = {{scratch_bytes, run}, ...};
#define CVMK_JOIN_AS_IS(a, b) a##b
#define CVMK_JOIN(a, b) CVMK_JOIN_AS_IS(a, b)

#define CVMK_KERNELS(folder)                       \
  namespace cvmk::folder {                         \
  extern const Kernels CVMK_JOIN(at_, CVMK_LEVEL); \
  }                                                \
  const cvmk::folder::Kernels cvmk::folder::CVMK_JOIN(at_, CVMK_LEVEL)
