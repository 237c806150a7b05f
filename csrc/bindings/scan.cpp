// Binds the selective scan, whose arguments come as one flat sequence of integers, and its single step, whose arguments are tensors.
#include <pybind11/pybind11.h>

#include <new>

#include "bindings/scan_arguments.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace {

using namespace cvmk::scan;

template <typename Arguments>
void run(int (*kernel)(const Arguments&), const Arguments& arguments) {
  int status = 0;
  {
    const py::gil_scoped_release release;
    status = kernel(arguments);
  }
  if (status != 0) throw std::bad_alloc();
}

template <typename Arguments>
void call(Arguments (*read)(Reader&), int (*kernel)(const Arguments&), const py::tuple& values) {
  Reader r(values);
  const Arguments arguments = read(r);
  r.finish();
  run(kernel, arguments);
}

void scan_forward(const py::tuple& values) { call(&read_forward, &forward, values); }
void scan_backward(const py::tuple& values) { call(&read_backward, &backward, values); }

using cvmk::bindings::Tensor;

std::int64_t code(const Tensor& x) {
  const std::int64_t found = cvmk::bindings::float_code(x, kFloat32);
  if (found > kFloat16) throw std::invalid_argument("the step reads float32, bfloat16 and float16");
  return found;
}

// Without heads each channel is a head of one row, whose stride does not matter.
Update::Input per_step(const Tensor& x, bool heads) {
  if (!x) return {};
  x.expect(heads ? 3 : 2, "x, dt or z");
  return {x.data(), code(x), x.stride(0), x.stride(1), heads ? x.stride(2) : 0};
}
Update::Input per_row(const Tensor& x, bool heads) {
  if (!x) return {};
  x.expect(heads ? 2 : 1, "D or dt_bias");
  return {x.data(), code(x), 0, x.stride(0), heads ? x.stride(1) : 0};
}
View per_group(const Tensor& x) {
  if (x.dims != 2) x.expect(3, "B or C");
  return {x.data(), code(x), x.stride(0), x.dims == 2 ? 0 : x.stride(1), x.stride(-1)};
}

void state_update(const py::args& args) {
  cvmk::bindings::Arguments in(args.ptr());
  const Tensor state = in.tensor();
  const bool heads = state.dims == 4;
  if (!heads) state.expect(3, "state");
  Update p{};
  p.batch = state.size(0);
  p.heads = state.size(1);
  p.dim = heads ? state.size(2) : 1;
  p.states = state.size(-1);
  p.state = state.data();
  p.state_dtype = code(state);
  p.state_batch = state.stride(0);
  p.state_head = state.stride(1);
  p.state_row = heads ? state.stride(2) : 0;
  p.state_column = state.stride(-1);
  p.x = per_step(in.tensor(), heads);
  p.dt = per_step(in.tensor(), heads);
  const Tensor A = in.tensor();
  A.expect(heads ? 3 : 2, "A");
  p.A = A.data();
  p.A_head = A.stride(0);
  p.A_row = heads ? A.stride(1) : 0;
  p.A_column = A.stride(-1);
  const Tensor B = in.tensor(), C = in.tensor();
  p.groups = B.dims == 2 ? 1 : B.size(1);
  p.B = per_group(B);
  p.C = per_group(C);
  p.D = per_row(in.tensor(), heads);
  p.z = per_step(in.tensor(), heads);
  p.bias = per_row(in.tensor(), heads);
  p.softplus = in.integer();
  p.out = in.tensor().data();
  in.finish();
  run(&update, p);
}

}  // namespace

void bind_scan(py::module_& m) {
  m.attr("scan_chunk") = kChunk;
  m.def("scan_forward", &scan_forward, "Forward pass of the selective scan");
  m.def("scan_backward", &scan_backward, "Backward pass of the selective scan");
  m.def("scan_state_update", &state_update, "state (overwritten), x, dt, A (float32), B, C, D, z, dt_bias, softplus, out");
}
