// Binds the CUDA kernels of the selective scan: the stream, then the arguments as for the CPU library.
#include "bindings/cuda_call.h"
#include "bindings/scan_arguments.h"
#include "scan/cuda_scan.h"

namespace {

using namespace cvmk::scan;

void scan_forward(Arguments& in) {
  const Stream stream = in.integer();
  const ScanForward p = read_forward(in);
  cvmk::bindings::queue(&cuda_forward, in, p, stream);
}

// The workspace is the last argument. Without one: how many floats it must have, and nothing is run.
std::int64_t scan_backward(Arguments& in) {
  const Stream stream = in.integer();
  CudaBackward p{};
  p.pass = read_backward(in);
  p.workspace = floats(in, "workspace");
  if (p.workspace != nullptr) cvmk::bindings::queue(&cuda_backward, in, p, stream);
  return cuda_workspace(p.pass);
}

void state_update(Arguments& in) {
  const Stream stream = in.integer();
  const Update p = read_update(in);
  cvmk::bindings::queue(&cuda_update, in, p, stream);
}

}  // namespace

void bind_cuda_scan(pybind11::module_& m) {
  using cvmk::bindings::add, cvmk::bindings::kGpu;
  add<&scan_forward>(m, "scan_forward", "selective_scan", "Forward pass of the selective scan", kGpu);
  add<&scan_backward>(m, "scan_backward", "selective_scan", "Backward pass; returns the floats that its workspace needs", kGpu);
  add<&state_update>(m, "scan_state_update", "selective_state_update", "One step of the selective scan; the state is overwritten", kGpu);
}
