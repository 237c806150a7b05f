// Binds the residual sum with its norm and their gradients.
#include <cstdint>
#include <stdexcept>

#include "bindings/call.h"
#include "bindings/elements_arguments.h"
#include "norm/params.h"

namespace {

using namespace cvmk::norm;
using cvmk::bindings::Arguments;
using cvmk::Elements;
using cvmk::bindings::elements;
using cvmk::bindings::Tensor;

// The fields of `Call` in cvmk/ops/residual_norm.py, in their order.
struct Call {
  Shape shape{};
  Elements x, branch, bias;
  float epsilon;

  explicit Call(Arguments in) {
    const Tensor first = in.tensor("x"), second = in.optional("branch"), weight = in.tensor("weight"), third = in.optional("bias");
    in.next();  // dropout_seed
    shape.rms = in.integer() != 0;
    epsilon = in.number();
    for (int i = 0; i < 3; ++i) in.next();  // dropout_p, normed_dtype, keep_stats
    in.finish();
    if (first.dims < 1) throw std::invalid_argument(in.about("x") + "must have a dimension");
    shape.n = first.size(-1);
    shape.rows = 1;
    for (int i = 0; i + 1 < first.dims; ++i) shape.rows *= first.size(i);
    x = of_rows(in, first, "x");
    branch = of_rows(in, second, "branch");
    shape.weight = elements(in, weight, shape.n, "weight");
    bias = elements(in, third, shape.n, "bias");
  }
  Elements of_rows(const Arguments& in, const Tensor& t, const char* name) const { return elements(in, t, shape.rows * shape.n, name); }

  // The factor, key and limit of dropout.
  void read_dropout(Arguments& in) {
    shape.keep_factor = in.number();
    shape.dropout_key = static_cast<std::uint32_t>(in.integer());
    shape.dropout_limit = static_cast<std::uint32_t>(in.integer());
  }
  float* stats(const Arguments& in, const Tensor& t) const {
    elements(in, t, 2 * shape.rows, "stats");
    return in.data_of<float>(t, cvmk::kFloat32, "stats");
  }
};

void forward(Arguments& in) {
  Call c(in.fields());
  ResidualForward p{};
  p.sum = c.of_rows(in, in.optional("sum"), "sum");
  p.normed = c.of_rows(in, in.tensor("normed"), "normed");
  p.stats = c.stats(in, in.optional("stats"));
  c.read_dropout(in);
  p.shape = c.shape;
  p.x = c.x;
  p.branch = c.branch;
  p.bias = c.bias;
  p.epsilon = c.epsilon;
  cvmk::bindings::run(kernels().forward, in, p);
}

void backward(Arguments& in) {
  Call c(in.fields());
  ResidualBackward p{};
  p.sum = c.of_rows(in, in.tensor("sum"), "sum");
  p.stats = c.stats(in, in.tensor("stats"));
  p.grad_sum = c.of_rows(in, in.optional("grad_sum"), "grad_sum");
  p.grad_normed = c.of_rows(in, in.tensor("grad_normed"), "grad_normed");
  p.dx = c.of_rows(in, in.optional("dx"), "dx");
  p.dbranch = c.of_rows(in, in.optional("dbranch"), "dbranch");
  p.dweight = elements(in, in.optional("dweight"), c.shape.n, "dweight");
  p.dbias = elements(in, in.optional("dbias"), c.shape.n, "dbias");
  c.read_dropout(in);
  p.shape = c.shape;
  cvmk::bindings::run(kernels().backward, in, p);
}

}  // namespace

void bind_norm(pybind11::module_& m) {
  using cvmk::bindings::add;
  add<&forward>(m, "residual_norm_forward", "residual_norm", "a Call of cvmk.ops.residual_norm; sum, normed and stats to write; 1 / (1 - dropout_p), dropout key and limit");
  add<&backward>(m, "residual_norm_backward", "residual_norm",
                 "a Call, sum, stats, the gradients of sum and normed, those of x, branch, weight and bias to write; then the dropout as forwards");
}
