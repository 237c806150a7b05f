// The arguments of the selective scan, for the CPU library and for the CUDA library.
#pragma once

#include "bindings/tensor.h"
#include "scan/params.h"

namespace cvmk::scan {

using bindings::Arguments;
using bindings::Tensor;

// [batch, row, column], or nothing.
inline View view_of(const Arguments& in, const Tensor& x, const char* name) {
  if (!x) return {};
  x.expect(3, name);
  return {x.data(), in.floating(x, name), x.stride(0), x.stride(1), x.stride(2)};
}

// B or C: [batch, group, state, time], or [channel, state] in float32 and contiguous.
inline Weights weights_of(const Arguments& in, const Tensor& x, const char* name) {
  Weights w{};
  if (x.dims == 2) {
    w.constant = in.data_of<const float>(x, kFloat32, name);
    return w;
  }
  x.expect(4, name);
  w.varying = {x.data(), in.floating(x, name), x.stride(0), x.stride(2), x.stride(3)};
  w.group = x.stride(1);
  return w;
}

inline float* floats(Arguments& in, const char* name) { return in.data_of<float>(in.optional(name), kFloat32, name); }

// u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse. A, D, bias and initial state are float32 and contiguous.
inline Scan read_scan(Arguments& in) {
  Scan s{};
  const Tensor u = in.tensor("u"), delta = in.tensor("delta"), A = in.tensor("A"), B = in.tensor("B"), C = in.tensor("C");
  s.u = view_of(in, u, "u");
  s.delta = view_of(in, delta, "delta");
  A.expect(2, "A");
  s.A = in.data_of<const float>(A, kFloat32, "A");
  s.B = weights_of(in, B, "B");
  s.C = weights_of(in, C, "C");
  s.D = floats(in, "D");
  s.z = view_of(in, in.optional("z"), "z");
  s.bias = floats(in, "delta_bias");
  s.initial = floats(in, "initial_state");
  const Tensor cu = in.optional("cu_seqlens");
  if (cu) {
    cu.expect(1, "cu_seqlens");
    s.cu_seqlens = cu.data();
    s.cu_dtype = in.counting(cu, "cu_seqlens");
    s.sequences = cu.size(0) - 1;
  }
  s.batch = u.size(0);
  s.channels = u.size(1);
  s.length = u.size(2);
  s.states = A.size(1);
  s.groups = B.dims == 4 ? B.size(1) : C.dims == 4 ? C.size(1) : 1;
  s.softplus = in.integer();
  s.reverse = in.integer();
  return s;
}

// The scan, out, last state, and the states before the chunks where they are kept.
inline ScanForward read_forward(Arguments& in) {
  ScanForward p{};
  p.scan = read_scan(in);
  p.out = in.tensor("out").data();
  p.last = floats(in, "last_state");
  p.kept = floats(in, "states");
  return p;
}

// The scan, the gradients of out and of the last state, the kept states, and where the gradients go: of u, delta, A, B, C, D, z, bias, initial state.
inline ScanBackward read_backward(Arguments& in) {
  ScanBackward p{};
  p.scan = read_scan(in);
  p.grad_out = view_of(in, in.optional("grad_out"), "grad_out");
  p.grad_last = floats(in, "grad_last_state");
  p.kept = floats(in, "states");
  p.du = in.optional("the gradient of u").data();
  p.ddelta = in.optional("the gradient of delta").data();
  p.dA = floats(in, "the gradient of A");
  p.dB = in.optional("the gradient of B").data();
  p.dC = in.optional("the gradient of C").data();
  p.dD = floats(in, "the gradient of D");
  p.dz = in.optional("the gradient of z").data();
  p.dbias = floats(in, "the gradient of delta_bias");
  p.dinitial = floats(in, "the gradient of initial_state");
  return p;
}

// Without heads each channel is a head of one row, whose stride does not matter.
inline Update::Input per_step(Arguments& in, const char* name, bool heads) {
  const Tensor x = in.optional(name);
  if (!x) return {};
  x.expect(heads ? 3 : 2, name);
  return {x.data(), in.floating(x, name), x.stride(0), x.stride(1), heads ? x.stride(2) : 0};
}
inline Update::Input per_row(Arguments& in, const char* name, bool heads) {
  const Tensor x = in.optional(name);
  if (!x) return {};
  x.expect(heads ? 2 : 1, name);
  return {x.data(), in.floating(x, name), 0, x.stride(0), heads ? x.stride(1) : 0};
}
inline View per_group(const Arguments& in, const Tensor& x, const char* name) {
  if (x.dims != 2) x.expect(3, name);
  return {x.data(), in.floating(x, name), x.stride(0), x.dims == 2 ? 0 : x.stride(1), x.stride(-1)};
}

// state, x, dt, A (float32), B, C, D, z, dt_bias, dt_softplus, y.
inline Update read_update(Arguments& in) {
  const Tensor state = in.tensor("state");
  const bool heads = state.dims == 4;
  if (!heads) state.expect(3, "state");
  Update p{};
  p.batch = state.size(0);
  p.heads = state.size(1);
  p.dim = heads ? state.size(2) : 1;
  p.states = state.size(-1);
  p.state = state.data();
  p.state_dtype = in.floating(state, "state");
  p.state_batch = state.stride(0);
  p.state_head = state.stride(1);
  p.state_row = heads ? state.stride(2) : 0;
  p.state_column = state.stride(-1);
  p.x = per_step(in, "x", heads);
  p.dt = per_step(in, "dt", heads);
  const Tensor A = in.tensor("A");
  A.expect(heads ? 3 : 2, "A");
  p.A = in.data_of<const float>(A, kFloat32, "A");
  p.A_head = A.stride(0);
  p.A_row = heads ? A.stride(1) : 0;
  p.A_column = A.stride(-1);
  const Tensor B = in.tensor("B"), C = in.tensor("C");
  p.groups = B.dims == 2 ? 1 : B.size(1);
  p.B = per_group(in, B, "B");
  p.C = per_group(in, C, "C");
  p.D = per_row(in, "D", heads);
  p.z = per_step(in, "z", heads);
  p.bias = per_row(in, "dt_bias", heads);
  p.softplus = in.integer();
  p.out = in.tensor("y").data();
  return p;
}

}  // namespace cvmk::scan
