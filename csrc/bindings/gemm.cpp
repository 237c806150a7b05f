// Bindings of the quantised linears: addresses, sizes and strides in, nothing of torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>

#include "gemm/params.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace cvmk::gemm;

template <typename T>
const T* pointer(std::uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

Linear linear(std::uintptr_t x, int x_dtype, std::int64_t x_stride, std::int64_t rows, std::int64_t inputs, std::int64_t outputs, std::uintptr_t out, int out_dtype,
              std::uintptr_t scales, std::uintptr_t bias, int bias_dtype, int activation) {
  Linear l;
  l.x = pointer<void>(x);
  l.x_stride = x_stride;
  l.out = reinterpret_cast<void*>(out);
  l.bias = pointer<void>(bias);
  l.scales = pointer<float>(scales);
  l.rows = rows;
  l.inputs = inputs;
  l.outputs = outputs;
  l.x_dtype = x_dtype;
  l.out_dtype = out_dtype;
  l.bias_dtype = bias_dtype;
  l.activation = activation;
  l.scratch = nullptr;
  return l;
}

void checked(int failed) {
  if (failed) throw std::bad_alloc();
}

void int8(std::uintptr_t x, int x_dtype, std::int64_t x_stride, std::int64_t rows, std::int64_t inputs, std::int64_t outputs, std::uintptr_t out, int out_dtype,
          std::uintptr_t scales, std::uintptr_t bias, int bias_dtype, int activation, std::uintptr_t weight, std::uintptr_t smooth_scale, int smooth_dtype) {
  Int8Linear p;
  p.linear = linear(x, x_dtype, x_stride, rows, inputs, outputs, out, out_dtype, scales, bias, bias_dtype, activation);
  p.weight = pointer<std::int8_t>(weight);
  p.smooth_scale = pointer<void>(smooth_scale);
  p.smooth_dtype = smooth_dtype;
  p.vnni = 0;
  const py::gil_scoped_release release;
  checked(int8_linear(p));
}

void int4(std::uintptr_t x, int x_dtype, std::int64_t x_stride, std::int64_t rows, std::int64_t inputs, std::int64_t outputs, std::uintptr_t out, int out_dtype,
          std::uintptr_t scales, std::uintptr_t bias, int bias_dtype, int activation, std::uintptr_t weight, std::uintptr_t zeros, std::uintptr_t order,
          std::int64_t group) {
  Int4Linear p;
  p.linear = linear(x, x_dtype, x_stride, rows, inputs, outputs, out, out_dtype, scales, bias, bias_dtype, activation);
  p.weight = pointer<std::uint16_t>(weight);
  p.zeros = pointer<std::uint8_t>(zeros);
  p.order = pointer<std::int32_t>(order);
  p.group = group;
  const py::gil_scoped_release release;
  checked(int4_linear(p));
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.def("int8_linear", &int8, "csrc/gemm/params.h says what the arguments are");
  m.def("int4_linear", &int4, "csrc/gemm/params.h says what the arguments are");
}
