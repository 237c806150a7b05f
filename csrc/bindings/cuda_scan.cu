// Binds the CUDA kernels of the selective scan: the stream, then the arguments as for the CPU library.
#include "bindings/cuda_call.h"
#include "bindings/scan_arguments.h"
#include "scan/cuda_scan.h"

namespace {

using namespace cvmk::scan;

template <typename Params>
const Params& checked(const Arguments& in, const Call<Params>& call) {
  if (!call.readable) throw std::invalid_argument(in.about("an argument") + "has a type or strides that the kernels do not read");
  return call.p;
}

void scan_forward(Arguments& in) {
  const Stream stream = in.integer();
  const Call<ScanForward> call = read_forward(in);
  cvmk::bindings::queue(&cuda_forward, in, checked(in, call), stream);
}

// The workspace is the last argument. Without one: how many floats it must have, and nothing is run.
std::int64_t scan_backward(Arguments& in) {
  const Stream stream = in.integer();
  const Call<ScanBackward> call = read_backward(in);
  const CudaBackward p{checked(in, call), floats(in, "workspace")};
  if (p.workspace != nullptr) cvmk::bindings::queue(&cuda_backward, in, p, stream);
  return cuda_workspace(p.pass);
}

void state_update(Arguments& in) {
  const Stream stream = in.integer();
  const Call<Update> call = read_update(in);
  cvmk::bindings::queue(&cuda_update, in, checked(in, call), stream);
}

}  // namespace

void bind_cuda_scan(pybind11::module_& m) {
  using cvmk::bindings::add, cvmk::bindings::kGpu;
  add<&scan_forward>(m, "scan_forward", "selective_scan", "Forward pass of the selective scan", kGpu);
  add<&scan_backward>(m, "scan_backward", "selective_scan", "Backward pass; returns the floats that its workspace needs", kGpu);
  add<&state_update>(m, "scan_state_update", "selective_state_update", "One step of the selective scan; the state is overwritten", kGpu);
}
