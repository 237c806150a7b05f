// Binds the selective scan and its single step.
#include "bindings/call.h"
#include "bindings/scan_arguments.h"

namespace {

using namespace cvmk::scan;

void scan_forward(Arguments& in) {
  const ScanForward p = read_forward(in);
  cvmk::bindings::run(kernels().forward, in, p);
}

void scan_backward(Arguments& in) {
  const ScanBackward p = read_backward(in);
  cvmk::bindings::run(kernels().backward, in, p);
}

void state_update(Arguments& in) {
  const Update p = read_update(in);
  cvmk::bindings::run(kernels().update, in, p);
}

}  // namespace

void bind_scan(pybind11::module_& m) {
  using cvmk::bindings::add;
  m.attr("scan_chunk") = kChunk;
  add<&scan_forward>(m, "scan_forward", "selective_scan", "Forward pass; bindings/scan_arguments.h lists the arguments");
  add<&scan_backward>(m, "scan_backward", "selective_scan", "Backward pass");
  add<&state_update>(m, "scan_state_update", "selective_state_update", "One step; the state is overwritten");
}
