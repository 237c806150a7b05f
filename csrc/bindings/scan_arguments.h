// The arguments of the selective scan from one flat sequence of integers, for the CPU library and for the CUDA library.
#pragma once

#include <cstdint>

#include "bindings/reader.h"
#include "scan/params.h"

namespace cvmk::scan {

// Members are read in the order in which they are declared: braces order their expressions from left to right.
inline View read_view(Reader& r) { return {r.pointer<void>(), r.next(), r.next(), r.next(), r.next()}; }

inline Weights read_weights(Reader& r) {
  Weights w{};
  w.varying.data = r.pointer<void>();
  w.varying.dtype = r.next();
  w.varying.batch = r.next();
  w.group = r.next();
  w.varying.row = r.next();
  w.varying.column = r.next();
  w.constant = r.pointer<const float>();
  return w;
}

inline Scan read_scan(Reader& r) {
  Scan s{};
  for (std::int64_t* size : {&s.batch, &s.channels, &s.length, &s.states, &s.groups, &s.softplus, &s.reverse}) *size = r.next();
  for (View* tensor : {&s.u, &s.delta, &s.z}) *tensor = read_view(r);
  s.B = read_weights(r);
  s.C = read_weights(r);
  for (const float** tensor : {&s.A, &s.D, &s.bias, &s.initial}) *tensor = r.pointer<const float>();
  s.cu_seqlens = r.pointer<const void>();
  s.cu_bytes = r.next();
  s.sequences = r.next();
  return s;
}

inline ScanForward read_forward(Reader& r) {
  ScanForward p{};
  p.scan = read_scan(r);
  p.out = r.pointer<void>();
  p.last = r.pointer<float>();
  p.kept = r.pointer<float>();
  return p;
}

inline ScanBackward read_backward(Reader& r) {
  ScanBackward p{};
  p.scan = read_scan(r);
  p.grad_out = read_view(r);
  p.grad_last = r.pointer<const float>();
  p.kept = r.pointer<const float>();
  p.du = r.pointer<void>();
  p.ddelta = r.pointer<void>();
  p.dA = r.pointer<float>();
  p.dB = r.pointer<void>();
  p.dC = r.pointer<void>();
  p.dD = r.pointer<float>();
  p.dz = r.pointer<void>();
  p.dbias = r.pointer<float>();
  p.dinitial = r.pointer<float>();
  return p;
}

inline Update::Input read_input(Reader& r) { return {r.pointer<const void>(), r.next(), r.next(), r.next(), r.next()}; }

inline Update read_update(Reader& r) {
  Update p{};
  for (std::int64_t* size : {&p.batch, &p.heads, &p.dim, &p.states, &p.groups, &p.softplus}) *size = r.next();
  p.state = r.pointer<void>();
  for (std::int64_t* number : {&p.state_dtype, &p.state_batch, &p.state_head, &p.state_row, &p.state_column}) *number = r.next();
  for (Update::Input* tensor : {&p.x, &p.dt, &p.z}) *tensor = read_input(r);
  p.A = r.pointer<const void>();
  for (std::int64_t* stride : {&p.A_head, &p.A_row, &p.A_column}) *stride = r.next();
  for (View* tensor : {&p.B, &p.C}) *tensor = read_view(r);
  for (Update::Input* tensor : {&p.D, &p.bias}) *tensor = read_input(r);
  p.out = r.pointer<void>();
  return p;
}

}  // namespace cvmk::scan
