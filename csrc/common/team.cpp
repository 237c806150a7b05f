#include "common/team.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace cvmk {

#if defined(_OPENMP)

namespace {

void fork(void*, int width, Team::Body body, void* context) {
#pragma omp parallel num_threads(width)
  body(context, omp_get_thread_num(), omp_get_num_threads());
}

void barrier(void*) {
#pragma omp barrier
}

}  // namespace

Team openmp_team() { return {omp_in_parallel() != 0 ? 1 : omp_get_max_threads(), fork, barrier, nullptr}; }

#else

Team openmp_team() { return {}; }

#endif

}  // namespace cvmk
