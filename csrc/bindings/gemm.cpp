// Binds the quantised linears.
#include <limits>
#include <string>

#include "bindings/call.h"
#include "bindings/gemm_arguments.h"
#include "gemm/pack.h"

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
  const float* const range = in.data_of<const float>(in.optional("input_range"), kFloat32, "input_range");
  if (range != nullptr) p.range = *range > 0 ? *range : std::numeric_limits<float>::min();
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

void expect_elements(const Arguments& in, const Tensor& x, std::int64_t wanted, const char* name) {
  std::int64_t found = 1;
  for (int i = 0; i < x.dims; ++i) found *= x.size(i);
  if (found != wanted) throw std::invalid_argument(in.about(name) + "has " + std::to_string(found) + " elements, not " + std::to_string(wanted));
}

template <auto Turn>
void turn_int8(Arguments& in) {
  const Tensor values = in.tensor("values"), scales = in.tensor("scales"), to_values = in.tensor("the values"), to_scales = in.tensor("the scales");
  const std::int64_t outputs = in.integer(), inputs = in.integer();
  in.finish();
  const PackedSizes packed = packed_int8_sizes(outputs, inputs);
  const bool back = Turn == &unpack_int8;
  expect_elements(in, back ? values : to_values, packed.values, "the packed values");
  expect_elements(in, back ? scales : to_scales, packed.scales, "the packed scales");
  expect_elements(in, back ? to_values : values, outputs * inputs, "values");
  expect_elements(in, back ? to_scales : scales, outputs, "scales");
  Turn(in.data_of<std::int8_t>(values, kInt8, "values"), in.data_of<float>(scales, kFloat32, "scales"), outputs, inputs,
       in.data_of<std::int8_t>(to_values, kInt8, "the values"), in.data_of<float>(to_scales, kFloat32, "the scales"));
}

template <auto Turn>
void turn_int4(Arguments& in) {
  const Tensor values = in.tensor("values"), scales = in.tensor("scales"), zeros = in.optional("zeros");
  const Tensor to_values = in.tensor("the values"), to_scales = in.tensor("the scales"), to_zeros = in.optional("the zeros");
  const std::int64_t outputs = in.integer(), inputs = in.integer(), groups = in.integer();
  in.finish();
  const PackedSizes packed = packed_int4_sizes(outputs, inputs, groups);
  const bool back = Turn == &unpack_int4;
  expect_elements(in, back ? values : to_values, packed.values, "the packed values");
  expect_elements(in, back ? scales : to_scales, packed.scales, "the packed scales");
  expect_elements(in, back ? to_values : values, outputs * inputs / 2, "values");
  expect_elements(in, back ? to_scales : scales, outputs * groups, "scales");
  if (zeros) expect_elements(in, back ? zeros : to_zeros, packed.zeros, "the packed zeros");
  if (zeros) expect_elements(in, back ? to_zeros : zeros, outputs * groups, "zeros");
  Turn(in.data_of<std::uint8_t>(values, kUint8, "values"), in.data_of<float>(scales, kFloat32, "scales"), in.data_of<std::uint8_t>(zeros, kUint8, "zeros"),
       outputs, inputs, groups, in.data_of<std::uint8_t>(to_values, kUint8, "the values"), in.data_of<float>(to_scales, kFloat32, "the scales"),
       in.data_of<std::uint8_t>(to_zeros, kUint8, "the zeros"));
}

}  // namespace

void bind_gemm(pybind11::module_& m) {
  using cvmk::bindings::add;
  add<&int8>(m, "int8_linear", "int8_linear", "x, out, scales, bias, activation, values, smooth_scale, input_range: csrc/gemm/params.h says what they are");
  add<&int4>(m, "int4_linear", "int4_linear", "x, out, scales, bias, activation, values, zeros, order, group: csrc/gemm/params.h says what they are");
  add<&turn_int8<&pack_int8>>(m, "pack_int8", "quantize_int8", "values, scales; packed values, scales; outputs, inputs: csrc/gemm/pack.h");
  add<&turn_int8<&unpack_int8>>(m, "unpack_int8", "quantize_int8", "packed values, scales; values, scales; outputs, inputs");
  add<&turn_int4<&pack_int4>>(m, "pack_int4", "quantize_int4", "values, scales, zeros; packed values, scales, zeros; outputs, inputs, groups: csrc/gemm/pack.h");
  add<&turn_int4<&unpack_int4>>(m, "unpack_int4", "quantize_int4", "packed values, scales, zeros; values, scales, zeros; outputs, inputs, groups");
}
