// The arguments of the selective scan, for the CPU library and for the CUDA library.
#pragma once

#include "bindings/tensor.h"
#include "scan/params.h"

namespace cvmk::scan {

using bindings::Arguments;
using bindings::Tensor;

// What a call holds, and whether kernels can read it as it lies: steps in float32, bfloat16 or float16, and float32 without gaps for the rest.
template <typename Params>
struct Call {
  Params p{};
  bool readable = true;
};

inline bool is_narrow(const Tensor& x) { return x.dtype() >= kFloat32 && x.dtype() <= kFloat16; }

// [batch, row, column], or nothing.
inline View view_of(const Tensor& x, const char* name, bool* readable) {
  if (!x) return {};
  x.expect(3, name);
  *readable &= is_narrow(x);
  return {x.data(), x.dtype(), x.stride(0), x.stride(1), x.stride(2)};
}

inline float* floats_of(const Tensor& x, bool* readable) {
  *readable &= !x || (x.dtype() == kFloat32 && x.is_contiguous());
  return static_cast<float*>(x.data());
}

// B or C: [batch, group, state, time], or the same at every step: [channel, state].
inline Weights weights_of(const Tensor& x, const char* name, bool* readable) {
  Weights w{};
  if (x.dims == 2) {
    w.constant = floats_of(x, readable);
    return w;
  }
  x.expect(4, name);
  *readable &= is_narrow(x);
  w.varying = {x.data(), x.dtype(), x.stride(0), x.stride(2), x.stride(3)};
  w.group = x.stride(1);
  return w;
}

// Results, and what the op made itself.
inline float* floats(Arguments& in, const char* name) { return in.data_of<float>(in.optional(name), kFloat32, name); }

// Steps that were read as [batch, row, column] and are [batch, column, row].
inline void turn(View* v) {
  const int64_t row = v->row;
  v->row = v->column;
  v->column = row;
}
// Likewise [batch, group, state, time] that is [batch, time, group, state].
inline void turn(Weights* w) {
  const int64_t time = w->group;
  w->group = w->varying.row;
  w->varying.row = w->varying.column;
  w->varying.column = time;
}

// u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, channels_last.
inline Scan read_scan(Arguments& in, bool* readable) {
  Scan s{};
  const Tensor u = in.tensor("u"), delta = in.tensor("delta"), A = in.tensor("A"), B = in.tensor("B"), C = in.tensor("C");
  s.u = view_of(u, "u", readable);
  s.delta = view_of(delta, "delta", readable);
  A.expect(2, "A");
  s.A = floats_of(A, readable);
  s.B = weights_of(B, "B", readable);
  s.C = weights_of(C, "C", readable);
  s.D = floats_of(in.optional("D"), readable);
  s.z = view_of(in.optional("z"), "z", readable);
  s.bias = floats_of(in.optional("delta_bias"), readable);
  s.initial = floats_of(in.optional("initial_state"), readable);
  const Tensor cu = in.optional("cu_seqlens");
  if (cu) {
    cu.expect(1, "cu_seqlens");
    *readable &= cu.is_contiguous();
    s.cu_seqlens = cu.data();
    s.cu_dtype = in.counting(cu, "cu_seqlens");
    s.sequences = cu.size(0) - 1;
  }
  s.softplus = in.integer();
  s.reverse = in.integer();
  s.channels_last = in.integer();
  const int last = s.channels_last ? 2 : 1;
  if (s.channels_last) {
    for (View* v : {&s.u, &s.delta, &s.z}) turn(v);
    for (Weights* w : {&s.B, &s.C}) turn(w);
  }
  s.batch = u.size(0);
  s.channels = u.size(last);
  s.length = u.size(3 - last);
  s.states = A.size(1);
  s.groups = B.dims == 4 ? B.size(last) : C.dims == 4 ? C.size(last) : 1;
  return s;
}

// The scan, whether states are kept, out, last state and states.
inline Call<ScanForward> read_forward(Arguments& in) {
  Call<ScanForward> call;
  ScanForward& p = call.p;
  p.scan = read_scan(in, &call.readable);
  const bool keeps = in.integer() != 0;
  p.out = in.tensor("out").data();
  p.last = floats(in, "last_state");
  float* const states = floats(in, "states");
  p.kept = keeps ? states : nullptr;
  return call;
}

// The scan, whether states were kept, the gradients of out and of the last state, the states, and where the gradients go: of u, delta, A, B, C, D, z,
// bias and initial state, in the types of these but for A, D, bias and initial state, which are float32.
inline Call<ScanBackward> read_backward(Arguments& in) {
  Call<ScanBackward> call;
  ScanBackward& p = call.p;
  p.scan = read_scan(in, &call.readable);
  in.integer();
  p.grad_out = view_of(in.optional("grad_out"), "grad_out", &call.readable);
  if (p.scan.channels_last) turn(&p.grad_out);
  p.grad_last = floats_of(in.optional("grad_last_state"), &call.readable);
  p.kept = floats_of(in.tensor("states"), &call.readable);
  p.du = in.optional("the gradient of u").data();
  p.ddelta = in.optional("the gradient of delta").data();
  p.dA = floats(in, "the gradient of A");
  p.dB = in.optional("the gradient of B").data();
  p.dC = in.optional("the gradient of C").data();
  p.dD = floats(in, "the gradient of D");
  p.dz = in.optional("the gradient of z").data();
  p.dbias = floats(in, "the gradient of delta_bias");
  p.dinitial = floats(in, "the gradient of initial_state");
  return call;
}

// Without heads each channel is a head of one row, whose stride does not matter.
inline Update::Input per_step(Arguments& in, const char* name, bool heads, bool* readable) {
  const Tensor x = in.optional(name);
  if (!x) return {};
  x.expect(heads ? 3 : 2, name);
  *readable &= is_narrow(x);
  return {x.data(), x.dtype(), x.stride(0), x.stride(1), heads ? x.stride(2) : 0};
}
inline Update::Input per_row(Arguments& in, const char* name, bool heads, bool* readable) {
  const Tensor x = in.optional(name);
  if (!x) return {};
  x.expect(heads ? 2 : 1, name);
  *readable &= is_narrow(x);
  return {x.data(), x.dtype(), 0, x.stride(0), heads ? x.stride(1) : 0};
}
inline View per_group(const Tensor& x, const char* name, bool* readable) {
  if (x.dims != 2) x.expect(3, name);
  *readable &= is_narrow(x);
  return {x.data(), x.dtype(), x.stride(0), x.dims == 2 ? 0 : x.stride(1), x.stride(-1)};
}

// state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, y. Readable: A in float32, B and C with one number of groups.
inline Call<Update> read_update(Arguments& in) {
  Call<Update> call;
  Update& p = call.p;
  bool* const readable = &call.readable;
  const Tensor state = in.tensor("state");
  const bool heads = state.dims == 4;
  if (!heads) state.expect(3, "state");
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
  p.x = per_step(in, "x", heads, readable);
  p.dt = per_step(in, "dt", heads, readable);
  const Tensor A = in.tensor("A");
  A.expect(heads ? 3 : 2, "A");
  *readable &= A.dtype() == kFloat32;
  p.A = A.data();
  p.A_head = A.stride(0);
  p.A_row = heads ? A.stride(1) : 0;
  p.A_column = A.stride(-1);
  const Tensor B = in.tensor("B"), C = in.tensor("C");
  *readable &= B.dims == C.dims && (B.dims == 2 || B.size(1) == C.size(1));
  p.groups = B.dims == 2 ? 1 : B.size(1);
  p.B = per_group(B, "B", readable);
  p.C = per_group(C, "C", readable);
  p.D = per_row(in, "D", heads, readable);
  p.z = per_step(in, "z", heads, readable);
  p.bias = per_row(in, "dt_bias", heads, readable);
  p.softplus = in.integer();
  p.out = in.tensor("y").data();
  return call;
}

}  // namespace cvmk::scan
