// The arguments that the distillation losses have in common, for the CPU library and for the CUDA library.
#pragma once

#include "bindings/tensor.h"
#include "distill/params.h"

namespace cvmk::distill {

using cvmk::bindings::Arguments;
using cvmk::bindings::Tensor;

// divergence, temperature, mixture, label smoothing
inline Terms read_terms(Arguments& in) {
  Terms terms{};
  terms.divergence = static_cast<int>(in.integer());
  terms.temperature = in.number();
  terms.mixture = in.number();
  terms.smoothing = in.number();
  return terms;
}

// [rows, vocabulary], the last dimension contiguous; null data for None.
inline Logits read_logits(Arguments& in, const Tensor& x, const char* name) {
  if (!x) return {nullptr, 0, kFloat32};
  x.expect(2, name);
  return {x.data(), x.stride(0), in.floating(x, name)};
}

// One number in float32; null for None.
inline float* read_one(Arguments& in, const char* name) { return in.data_of<float>(in.optional(name), kFloat32, name); }

}  // namespace cvmk::distill
