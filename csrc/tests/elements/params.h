// What common/elements.h offers, as kernels at every level.
#pragma once

#include "common/dtype.h"
#include "common/kernel.h"

namespace cvmk {
namespace elements_test {

struct Kernels {
  const char* level;
  int lanes;
  void (*to_floats)(float* to, const void* from, Dtype type, int64_t n, int64_t padded);
  void (*from_floats)(void* to, Dtype type, const float* from, float factor, int64_t n);
  // to[i] = from[i] for types that are known at run time only, a vector at a time.
  void (*copy)(void* to, Dtype to_type, const void* from, Dtype from_type, int64_t n);
  // The same one by one, for the types that it was compiled for.
  void (*copy_singly)(float* to, const void* from, Dtype type, int64_t n);
  // n: a multiple of the lanes; `to` at a multiple of a vector's size.
  void (*stream)(void* to, Dtype type, const float* from, int64_t n);
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

}  // namespace elements_test
}  // namespace cvmk
