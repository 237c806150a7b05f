// Binds fused_linear and its gradients.
#include <cstdint>

#include "bindings/call.h"
#include "linear/params.h"

namespace {

using namespace cvmk::linear;
using cvmk::bindings::Arguments;
using cvmk::bindings::Tensor;

Matrix matrix(const Arguments& in, const Tensor& x, const char* name) {
  x.expect(2, name);
  return {x.data(), x.stride(0), in.floating(x, name), cvmk::kFloat32};
}

// x, weight, bias, what is kept, the activation's number, and the dropout's factor, key and limit.
Linear read_linear(Arguments& in) {
  Linear l{};
  const Tensor x = in.tensor("x"), weight = in.tensor("weight"), bias = in.optional("bias"), kept = in.optional("kept");
  l.x = matrix(in, x, "x");
  l.weight = matrix(in, weight, "weight");
  l.bias = bias.data();
  l.bias_dtype = in.floating(bias, "bias");
  l.kept = kept.data();
  l.rows = x.size(0);
  l.inputs = x.size(1);
  l.outputs = weight.size(0);
  l.activation = static_cast<Activation>(in.integer());
  l.keep_factor = in.number();
  l.dropout_key = static_cast<std::uint32_t>(in.integer());
  l.dropout_limit = static_cast<std::uint32_t>(in.integer());
  return l;
}

// The result or its gradient, whose type is that of the products.
void take_dtype(Linear& l, const Arguments& in, const Tensor& result, const char* name) {
  result.expect(2, name);
  l.dtype = l.x.rounds_to = l.weight.rounds_to = in.floating(result, name);
}

Written written(Arguments& in, const char* name) {
  const Tensor x = in.optional(name);
  return {x.data(), in.floating(x, name)};
}

void forward(Arguments& in) {
  Forward p{};
  p.linear = read_linear(in);
  const Tensor out = in.tensor("out");
  take_dtype(p.linear, in, out, "out");
  p.out = out.data();
  cvmk::bindings::run(kernels_for(p.linear).forward, in, p);
}

void backward(Arguments& in) {
  Backward p{};
  p.linear = read_linear(in);
  const Tensor grad = in.tensor("the gradient");
  take_dtype(p.linear, in, grad, "the gradient");
  p.grad = grad.data();
  p.grad_stride = grad.stride(0);
  p.dx = written(in, "the gradient of x");
  p.d_weight = written(in, "the gradient of the weight");
  p.d_bias = written(in, "the gradient of the bias");
  cvmk::bindings::run(kernels_for(p.linear).backward, in, p);
}

}  // namespace

void bind_linear(pybind11::module_& m) {
  using cvmk::bindings::add;
  add<&forward>(m, "linear_forward", "fused_linear",
                "x, weight, bias, what the backward pass needs of the activation, the activation's number, 1 / (1 - dropout_p), dropout key and limit, out: "
                "csrc/linear/params.h says what they are");
  add<&backward>(m, "linear_backward", "fused_linear",
                 "the arguments of linear_forward up to the limit, the gradient of the result, and those of x, weight and bias to write, None for what is not wanted");
}
