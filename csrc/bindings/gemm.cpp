// Binds the quantised linears.
#include "bindings/call.h"
#include "bindings/gemm_arguments.h"

namespace {

using namespace cvmk;
using namespace cvmk::gemm;

void int8(Arguments& in) {
  Int8Linear p{};
  p.linear = read_linear(in);
  p.weight = in.data_of<const std::int8_t>(in.tensor("values"), kInt8, "values");
  const Tensor smooth_scale = in.optional("smooth_scale");
  p.smooth_scale = smooth_scale.data();
  p.smooth_dtype = in.floating(smooth_scale, "smooth_scale");
  cvmk::bindings::run(kernels_for(p).int8, in, p);
}

void int4(Arguments& in) {
  Int4Linear p{};
  p.linear = read_linear(in);
  p.weight = reinterpret_cast<const std::uint16_t*>(in.data_of<const std::uint8_t>(in.tensor("values"), kUint8, "values"));
  p.zeros = in.data_of<const std::uint8_t>(in.optional("zeros"), kUint8, "zeros");
  p.order = in.data_of<const std::int32_t>(in.optional("order"), kInt32, "order");
  p.group = in.integer();
  cvmk::bindings::run(kernels().int4, in, p);
}

}  // namespace

void bind_gemm(pybind11::module_& m) {
  using cvmk::bindings::add;
  add<&int8>(m, "int8_linear", "int8_linear", "x, out, scales, bias, activation, values, smooth_scale: csrc/gemm/params.h says what they are");
  add<&int4>(m, "int4_linear", "int4_linear", "x, out, scales, bias, activation, values, zeros, order, group: csrc/gemm/params.h says what they are");
}
