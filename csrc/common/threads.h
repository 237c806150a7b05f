// Loops over independent work items on the threads of OpenMP, which are PyTorch's own where both are in one process.
//
// A result must not depend on which thread does an item: items write to places of their own.
#pragma once

#include <stdint.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {
namespace threads {

// How many threads a loop may use.
inline __attribute__((always_inline, unused)) int limit() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// The number of the calling thread within the present loop, from 0.
inline __attribute__((always_inline, unused)) int index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// body(i) for i in [0, count), handed out one by one; in the calling thread where there is only one item or one thread.
template <typename Body>
inline __attribute__((always_inline)) void each(int64_t count, const Body& body) {
#if defined(_OPENMP)
  const int64_t most = limit();
  const int width = static_cast<int>(count < most ? count : most);
  if (width > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(width)
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace threads
}  // namespace
