// Binds the CUDA kernels of the quantised linears for few rows: the stream, then the arguments as for the CPU library.
#include "bindings/cuda_call.h"
#include "bindings/gemm_arguments.h"
#include "gemm/cuda_rows.h"

namespace {

using namespace cvmk;
using namespace cvmk::gemm;

void run_int8(Arguments& in) {
  const Stream stream = in.integer();
  CudaInt8 p{};
  p.linear = read_linear(in);
  p.weight = in.data_of<const std::int8_t>(in.tensor("values"), kInt8, "values");
  const Tensor smooth_scale = in.optional("smooth_scale");
  p.smooth_scale = smooth_scale.data();
  p.smooth_dtype = in.floating(smooth_scale, "smooth_scale");
  cvmk::bindings::queue(&cuda_int8_rows, in, p, stream);
}

void run_int4(Arguments& in) {
  const Stream stream = in.integer();
  CudaInt4 p{};
  p.linear = read_linear(in);
  p.weight = in.data_of<const std::uint8_t>(in.tensor("values"), kUint8, "values");
  p.zeros = in.data_of<const std::uint8_t>(in.optional("zeros"), kUint8, "zeros");
  p.order = in.data_of<const std::int32_t>(in.optional("order"), kInt32, "order");
  p.group = in.integer();
  cvmk::bindings::queue(&cuda_int4_rows, in, p, stream);
}

}  // namespace

void bind_cuda_gemm(pybind11::module_& m) {
  using cvmk::bindings::add, cvmk::bindings::kGpu;
  m.attr("most_rows") = kMostRows;
  add<&run_int8>(m, "int8_linear", "int8_linear", "int8_linear of up to most_rows rows", kGpu);
  add<&run_int4>(m, "int4_linear", "int4_linear", "int4_linear of up to most_rows rows", kGpu);
  m.def("int8_shared", &cuda_int8_shared, "Bytes of shared memory for so many rows and inputs");
  m.def("int4_shared", &cuda_int4_shared, "Bytes of shared memory for so many rows and inputs");
}
