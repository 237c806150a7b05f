// Tensors without gaps, of a floating type that kernels find out.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/tensor.h"
#include "common/view.h"

namespace cvmk::bindings {

inline std::int64_t count_of(const Tensor& x) {
  std::int64_t count = 1;
  for (int i = 0; i < x.dims; ++i) count *= x.size(i);
  return count;
}

// A tensor of `count` elements without gaps, of a type below float64; null for None.
inline Elements elements(const Arguments& in, const Tensor& x, std::int64_t count, const char* name) {
  if (!x) return {nullptr, kFloat32};
  if (count_of(x) != count || !x.is_contiguous()) throw std::invalid_argument(in.about(name) + "must have " + std::to_string(count) + " elements without gaps");
  return {x.data(), in.floating(x, name)};
}

}  // namespace cvmk::bindings
