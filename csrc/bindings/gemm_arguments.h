// The arguments that the quantised linears have in common, for the CPU library and for the CUDA library.
#pragma once

#include "bindings/tensor.h"
#include "gemm/params.h"

namespace cvmk::gemm {

using cvmk::bindings::Arguments;
using cvmk::bindings::Tensor;

// x [rows, inputs], out [rows, columns], scales, bias, activation. Results may be float64.
inline Linear read_linear(Arguments& in) {
  const Tensor x = in.tensor("x"), out = in.tensor("out"), scales = in.tensor("scales"), bias = in.optional("bias");
  x.expect(2, "x");
  out.expect(2, "out");
  Linear l{};
  l.activation = static_cast<int>(in.integer());
  l.x = x.data();
  l.x_stride = x.stride(0);
  l.out = out.data();
  l.bias = bias.data();
  l.scales = in.data_of<const float>(scales, kFloat32, "scales");
  l.rows = x.size(0);
  l.inputs = x.size(1);
  l.outputs = out.size(1) * (l.activation == kSwiglu ? 2 : 1);
  l.x_dtype = in.floating(x, "x");
  l.out_dtype = in.floating(out, "out", kFloat64 + 1);
  l.bias_dtype = in.floating(bias, "bias");
  return l;
}

}  // namespace cvmk::gemm
