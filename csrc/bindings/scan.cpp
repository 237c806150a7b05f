// Binds the selective scan and its single step.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "bindings/call.h"
#include "bindings/scan_arguments.h"

namespace {

using namespace cvmk::scan;

// Packed sequences rise from 0 to the length; an op may read here what it may not read on a device.
void check_boundaries(const Arguments& in, const Scan& s) {
  if (s.cu_seqlens == nullptr) return;
  std::int64_t before = 0;
  for (std::int64_t i = 0; i <= s.sequences; ++i) {
    const std::int64_t at = cvmk::integer_at(s.cu_seqlens, s.cu_dtype, i);
    if (at < before || at > s.length || (i == 0 && at != 0) || (i == s.sequences && at != s.length))
      throw std::invalid_argument(in.about("cu_seqlens") + "must rise from 0 to " + std::to_string(s.length) + ", the length, but element " + std::to_string(i) +
                                  " is " + std::to_string(at));
    before = at;
  }
}

// 1, or 0 where nothing was run, for an argument must be copied into a form that kernels read.
template <typename Params>
std::int64_t run(const cvmk::Kernel<Params>& kernel, const Arguments& in, const Call<Params>& call) {
  if (!call.readable) return 0;
  if constexpr (!std::is_same_v<Params, Update>) check_boundaries(in, call.p.scan);
  cvmk::bindings::run(kernel, in, call.p);
  return 1;
}

std::int64_t scan_forward(Arguments& in) { return run(kernels().forward, in, read_forward(in)); }
std::int64_t scan_backward(Arguments& in) { return run(kernels().backward, in, read_backward(in)); }
std::int64_t state_update(Arguments& in) { return run(kernels().update, in, read_update(in)); }

}  // namespace

void bind_scan(pybind11::module_& m) {
  using cvmk::bindings::add;
  m.attr("scan_chunk") = kChunk;
  add<&scan_forward>(m, "scan_forward", "selective_scan", "Forward pass; bindings/scan_arguments.h lists the arguments");
  add<&scan_backward>(m, "scan_backward", "selective_scan", "Backward pass");
  add<&state_update>(m, "scan_state_update", "selective_state_update", "One step; the state is overwritten");
}
