// Binds short causal convolutions, their gradients and their step.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/call.h"
#include "bindings/elements_arguments.h"
#include "conv/params.h"

namespace {

using namespace cvmk::conv;
using cvmk::bindings::Arguments;
using cvmk::bindings::elements;
using cvmk::bindings::Tensor;

// A tensor of `count` float32 without gaps, or null.
float* floats(const Arguments& in, const Tensor& x, std::int64_t count, const char* name) {
  elements(in, x, count, name);
  return in.data_of<float>(x, cvmk::kFloat32, name);
}

// [batch, length, dim] whose channels are neighbours, and its strides; null for None.
cvmk::Elements steps(const Arguments& in, const Tensor& x, const char* name, std::int64_t* batch, std::int64_t* step) {
  if (!x) return {nullptr, cvmk::kFloat32};
  x.expect(3, name);
  if (x.stride(2) != 1 && x.size(2) > 1 && cvmk::bindings::count_of(x) > 0) throw std::invalid_argument(in.about(name) + "must have channels that are neighbours");
  *batch = x.stride(0);
  *step = x.stride(1);
  return {x.data(), in.floating(x, name)};
}

// x, weight, bias, initial_state, lengths, and whether the activation is silu, channels are last and it is reversed: `ConvCall` in
// cvmk/ops/causal_conv1d.py.
Shape read_shape(Arguments& in, cvmk::Elements* x) {
  const Tensor given = in.tensor("x"), weight = in.tensor("weight"), bias = in.optional("bias"), before = in.optional("initial_state");
  const Tensor lengths = in.optional("lengths");
  given.expect(3, "x");
  weight.expect(2, "weight");
  Shape s{};
  s.batch = given.size(0);
  s.width = weight.size(1);
  if (s.width < 1 || s.width > kMaxWidth) throw std::invalid_argument(in.about("weight") + "must have a width of 1 to " + std::to_string(kMaxWidth));
  s.dim = weight.size(0);
  s.weight = floats(in, weight, s.dim * s.width, "weight");
  s.bias = floats(in, bias, s.dim, "bias");
  s.before = floats(in, before, s.batch * s.dim * (s.width - 1), "initial_state");
  if (lengths) {
    lengths.expect(1, "lengths");
    if (!lengths.is_contiguous() || lengths.size(0) != s.batch) throw std::invalid_argument(in.about("lengths") + "must be one number a row, without gaps");
    s.lengths = lengths.data();
    s.lengths_dtype = in.counting(lengths, "lengths");
  }
  s.silu = in.integer() != 0;
  s.channels_last = in.integer() != 0;
  s.reverse = in.integer() != 0;
  if (s.reverse && !s.channels_last) throw std::invalid_argument(in.about("x") + "is read from the end with channels last only");
  s.length = given.size(s.channels_last ? 1 : 2);
  if (given.size(s.channels_last ? 2 : 1) != s.dim) throw std::invalid_argument(in.about("weight") + "must be [dim, width] with x's dim");
  *x = s.channels_last ? steps(in, given, "x", &s.x_batch, &s.x_step) : elements(in, given, s.batch * s.dim * s.length, "x");
  return s;
}

void forward(Arguments& in) {
  Forward p{};
  p.shape = read_shape(in, &p.x);
  const Shape& s = p.shape;
  p.out = elements(in, in.tensor("out"), s.batch * s.dim * s.length, "out");
  p.last = elements(in, in.tensor("last_state"), s.batch * s.dim * (s.width - 1), "last_state");
  cvmk::bindings::run(kernels().forward, in, p);
}

void backward(Arguments& in) {
  Backward p{};
  p.shape = read_shape(in, &p.x);
  const Shape& s = p.shape;
  const std::int64_t inputs = s.batch * s.dim * s.length, states = s.batch * s.dim * (s.width - 1);
  const Tensor grad_out = in.optional("grad_out");
  p.grad_out = s.channels_last ? steps(in, grad_out, "grad_out", &p.grad_batch, &p.grad_step) : elements(in, grad_out, inputs, "grad_out");
  p.grad_last = elements(in, in.optional("grad_last_state"), states, "grad_last_state");
  p.dx = elements(in, in.optional("the gradient of x"), inputs, "the gradient of x");
  p.dweight = floats(in, in.optional("the gradient of weight"), s.dim * s.width, "the gradient of weight");
  p.dbias = floats(in, in.optional("the gradient of bias"), s.dim, "the gradient of bias");
  p.dbefore = floats(in, in.optional("the gradient of initial_state"), states, "the gradient of initial_state");
  cvmk::bindings::run(kernels().backward, in, p);
}

// The fields of `UpdateCall`, and y to write.
void update(Arguments& in) {
  const Tensor state = in.tensor("state"), x = in.tensor("x"), weight = in.tensor("weight"), bias = in.optional("bias");
  x.expect(2, "x");
  weight.expect(2, "weight");
  Update p{};
  p.batch = x.size(0);
  p.dim = x.size(1);
  p.width = weight.size(1);
  if (p.width < 1) throw std::invalid_argument(in.about("weight") + "must have a width of at least 1");
  p.state = elements(in, state, p.batch * p.dim * (p.width - 1), "state");
  p.x = elements(in, x, p.batch * p.dim, "x");
  p.weight = floats(in, weight, p.dim * p.width, "weight");
  p.bias = floats(in, bias, p.dim, "bias");
  p.silu = in.integer() != 0;
  p.y = elements(in, in.tensor("y"), p.batch * p.dim, "y");
  cvmk::bindings::run(kernels().update, in, p);
}

}  // namespace

void bind_conv(pybind11::module_& m) {
  using cvmk::bindings::add;
  add<&forward>(m, "causal_conv1d_forward", "causal_conv1d",
                "a ConvCall of cvmk.ops.causal_conv1d, spread, without gaps and with weights in float32; out and last_state to write");
  add<&backward>(m, "causal_conv1d_backward", "causal_conv1d",
                 "a ConvCall as forwards, the gradients of out and last_state, those of x, weight, bias and initial_state to write, the last three float32");
  add<&update>(m, "causal_conv1d_update", "causal_conv1d_update", "an UpdateCall, spread, without gaps and with weights in float32; y to write");
}
