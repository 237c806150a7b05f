// Binds the steps of optimisers.
#include <stdexcept>

#include "bindings/call.h"
#include "optimizer/params.h"

namespace {

using cvmk::bindings::Arguments;
using cvmk::bindings::Tensor;

float* flat(Arguments& in, const char* name, std::int64_t& count) {
  const Tensor x = in.tensor(name);
  if (!x.is_contiguous()) throw std::invalid_argument(in.about(name) + "is not contiguous");
  std::int64_t found = 1;
  for (int i = 0; i < x.dims; ++i) found *= x.size(i);
  if (count >= 0 && found != count) throw std::invalid_argument(in.about(name) + "has another number of elements than the tensors before it");
  count = found;
  return in.data_of<float>(x, cvmk::kFloat32, name);
}

void adamw(Arguments& in) {
  std::int64_t count = -1;
  cvmk::optimizer::AdamW p{};
  p.weight = flat(in, "param", count);
  p.first = flat(in, "exp_avg", count);
  p.second = flat(in, "exp_avg_sq", count);
  p.gradient = flat(in, "grad", count);
  p.count = count;
  const Tensor scale = in.optional("grad_scale");
  p.scale = scale ? *in.data_of<float>(scale, cvmk::kFloat32, "grad_scale") : 1.0f;
  for (float* number : {&p.keep, &p.beta1, &p.rest1, &p.beta2, &p.rest2, &p.rate, &p.root, &p.epsilon}) *number = in.number();
  cvmk::bindings::run(cvmk::optimizer::kernels().adamw, in, p);
}

}  // namespace

void bind_optimizer(pybind11::module_& m) {
  cvmk::bindings::add<&adamw>(m, "adamw", "adamw", "One step over flat memory; csrc/optimizer/params.h says what the numbers are");
}
