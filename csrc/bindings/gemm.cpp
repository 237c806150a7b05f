// cvmk._native.int8_linear and int4_linear: tensors and numbers in, a status checked.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>

#include "bindings/tensor.h"
#include "gemm/params.h"

namespace py = pybind11;

namespace {

using namespace cvmk::gemm;
using cvmk::bindings::Arguments;
using cvmk::bindings::Tensor;

int dtype(const Tensor& x) { return x ? static_cast<int>(cvmk::bindings::float_code(x, kFloat32)) : kFloat32; }

// x [rows, inputs], out [rows, columns], scales, bias, activation.
Linear linear(Arguments& in) {
  const Tensor x = in.tensor(), out = in.tensor(), scales = in.tensor(), bias = in.tensor();
  x.expect(2, "x");
  out.expect(2, "out");
  Linear l;
  l.activation = static_cast<int>(in.integer());
  l.x = x.data();
  l.x_stride = x.stride(0);
  l.out = out.data();
  l.bias = bias.data();
  l.scales = static_cast<const float*>(scales.data());
  l.rows = x.size(0);
  l.inputs = x.size(1);
  l.outputs = out.size(1) * (l.activation == kSwiglu ? 2 : 1);
  l.x_dtype = dtype(x);
  l.out_dtype = dtype(out);
  l.bias_dtype = dtype(bias);
  l.scratch = nullptr;
  return l;
}

template <typename Call>
void run(int (*function)(Call), const Arguments& in, const Call& call) {
  in.finish();
  int failed = 0;
  {
    const py::gil_scoped_release release;
    failed = function(call);
  }
  if (failed) throw std::bad_alloc();
}

void int8(const py::args& args) {
  Arguments in(args.ptr());
  Int8Linear p;
  p.linear = linear(in);
  p.weight = static_cast<const std::int8_t*>(in.tensor().data());
  const Tensor smooth_scale = in.tensor();
  p.smooth_scale = smooth_scale.data();
  p.smooth_dtype = dtype(smooth_scale);
  p.vnni = 0;
  run(int8_linear, in, p);
}

void int4(const py::args& args) {
  Arguments in(args.ptr());
  Int4Linear p;
  p.linear = linear(in);
  p.weight = static_cast<const std::uint16_t*>(in.tensor().data());
  p.zeros = static_cast<const std::uint8_t*>(in.tensor().data());
  p.order = static_cast<const std::int32_t*>(in.tensor().data());
  p.group = in.integer();
  run(int4_linear, in, p);
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.def("int8_linear", &int8, "x, out, scales, bias, activation, weight, smooth_scale: csrc/gemm/params.h says what they are");
  m.def("int4_linear", &int4, "x, out, scales, bias, activation, weight, zeros, order, group: csrc/gemm/params.h says what they are");
}
