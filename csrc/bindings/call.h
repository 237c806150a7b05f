// How bindings run a kernel of the CPU library.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/tensor.h"
#include "common/scratch.h"

namespace cvmk::bindings {

// On OpenMP's threads, without the interpreter's lock, in scratch memory of the calling thread. Throws std::bad_alloc.
template <typename Params>
void run(const Kernel<Params>& kernel, const Arguments& in, const Params& p) {
  in.finish();
  const pybind11::gil_scoped_release release;
  cvmk::run(kernel, p, openmp_team());
}

}  // namespace cvmk::bindings
