// Binds the CUDA kernels of the quantised linears for few rows. Arguments come as one flat sequence of integers.
#include "bindings/cuda_call.h"
#include "gemm/cuda_rows.h"

namespace py = pybind11;

namespace {

using namespace cvmk::gemm;

CudaLinear linear(Reader& r) {
  CudaLinear l{};
  l.x = r.pointer<const void>();
  l.x_type = r.integer();
  l.x_stride = r.next();
  for (std::int64_t* size : {&l.rows, &l.inputs, &l.outputs}) *size = r.next();
  l.out = r.pointer<void>();
  l.out_type = r.integer();
  l.scales = r.pointer<const float>();
  l.bias = r.pointer<const void>();
  l.bias_type = r.integer();
  l.activation = r.integer();
  return l;
}

void run_int8(const py::tuple& values) {
  Reader r(values);
  const Place place(r);
  CudaInt8 p{};
  p.linear = linear(r);
  p.weight = r.pointer<const std::int8_t>();
  p.smooth_scale = r.pointer<const void>();
  p.smooth_type = r.integer();
  r.finish();
  queue(&cuda_int8_rows, p, place);
}

void run_int4(const py::tuple& values) {
  Reader r(values);
  const Place place(r);
  CudaInt4 p{};
  p.linear = linear(r);
  p.weight = r.pointer<const std::uint8_t>();
  p.zeros = r.pointer<const std::uint8_t>();
  p.order = r.pointer<const std::int32_t>();
  p.group = r.next();
  r.finish();
  queue(&cuda_int4_rows, p, place);
}

}  // namespace

void bind_cuda_gemm(py::module_& m) {
  m.attr("most_rows") = kMostRows;
  m.def("int8_linear", &run_int8, "int8_linear of up to most_rows rows");
  m.def("int4_linear", &run_int4, "int4_linear of up to most_rows rows");
  m.def("int8_shared", &cuda_int8_shared, "Bytes of shared memory for so many rows and inputs");
  m.def("int4_shared", &cuda_int4_shared, "Bytes of shared memory for so many rows and inputs");
}
