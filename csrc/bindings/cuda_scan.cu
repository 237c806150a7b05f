// Binds the CUDA kernels of the selective scan. Arguments come as one flat sequence of integers: device, stream, then as for the CPU library.
#include "bindings/cuda_call.h"
#include "bindings/scan_arguments.h"
#include "scan/cuda_scan.h"

namespace py = pybind11;

namespace {

using namespace cvmk::scan;

void scan_forward(const py::tuple& values) {
  Reader r(values);
  const Place place(r);
  const ScanForward p = read_forward(r);
  r.finish();
  queue(&cuda_forward, p, place);
}

// Without a workspace (address 0): how many floats it must have, and nothing is run.
std::int64_t scan_backward(const py::tuple& values) {
  Reader r(values);
  const Place place(r);
  CudaBackward p{};
  p.workspace = r.pointer<float>();
  p.pass = read_backward(r);
  r.finish();
  if (p.workspace != nullptr) queue(&cuda_backward, p, place);
  return cuda_workspace(p.pass);
}

void state_update(const py::tuple& values) {
  Reader r(values);
  const Place place(r);
  const Update p = read_update(r);
  r.finish();
  queue(&cuda_update, p, place);
}

}  // namespace

void bind_cuda_scan(py::module_& m) {
  m.def("scan_forward", &scan_forward, "Forward pass of the selective scan");
  m.def("scan_backward", &scan_backward, "Backward pass of the selective scan; returns the floats that its workspace needs");
  m.def("scan_state_update", &state_update, "One step of the selective scan; the state is overwritten");
}
