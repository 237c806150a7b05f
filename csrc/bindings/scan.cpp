// Binds the selective scan and its single step. Arguments come as one flat sequence of integers, in the order in which they are read here.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <stdexcept>

#include "scan/params.h"

namespace py = pybind11;

namespace {

using namespace cvmk::scan;

// Reads the numbers of a tuple one after the other.
class Reader {
 public:
  explicit Reader(const py::tuple& values) : values_(values) {}
  std::int64_t next() {
    if (at_ >= PyTuple_GET_SIZE(values_.ptr())) throw std::invalid_argument("too few numbers for a call of the scan");
    const std::int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(values_.ptr(), at_++));
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }
  template <typename T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(next()));
  }
  void finish() const {
    if (at_ != PyTuple_GET_SIZE(values_.ptr())) throw std::invalid_argument("too many numbers for a call of the scan");
  }

 private:
  const py::tuple& values_;
  py::ssize_t at_ = 0;
};

// Members are read in the order in which they are declared: braces order their expressions from left to right.
View view(Reader& r) { return {r.pointer<void>(), r.next(), r.next(), r.next(), r.next()}; }

Weights weights(Reader& r) {
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

Scan scan(Reader& r) {
  Scan s{};
  for (std::int64_t* size : {&s.batch, &s.channels, &s.length, &s.states, &s.groups, &s.softplus, &s.reverse}) *size = r.next();
  for (View* tensor : {&s.u, &s.delta, &s.z}) *tensor = view(r);
  s.B = weights(r);
  s.C = weights(r);
  for (const float** tensor : {&s.A, &s.D, &s.bias, &s.initial}) *tensor = r.pointer<const float>();
  s.cu_seqlens = r.pointer<const void>();
  s.cu_bytes = r.next();
  s.sequences = r.next();
  return s;
}

Update::Input input(Reader& r) { return {r.pointer<const void>(), r.next(), r.next(), r.next(), r.next()}; }

template <typename Arguments>
void call(int (*kernel)(const Arguments&), const Arguments& arguments) {
  int status = 0;
  {
    const py::gil_scoped_release release;
    status = kernel(arguments);
  }
  if (status != 0) throw std::bad_alloc();
}

void scan_forward(const py::tuple& values) {
  Reader r(values);
  ScanForward p{};
  p.scan = scan(r);
  p.out = r.pointer<void>();
  p.last = r.pointer<float>();
  p.kept = r.pointer<float>();
  r.finish();
  call(&forward, p);
}

void scan_backward(const py::tuple& values) {
  Reader r(values);
  ScanBackward p{};
  p.scan = scan(r);
  p.grad_out = view(r);
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
  r.finish();
  call(&backward, p);
}

void state_update(const py::tuple& values) {
  Reader r(values);
  Update p{};
  for (std::int64_t* size : {&p.batch, &p.heads, &p.dim, &p.states, &p.groups, &p.softplus}) *size = r.next();
  p.state = r.pointer<void>();
  for (std::int64_t* number : {&p.state_dtype, &p.state_batch, &p.state_head, &p.state_row, &p.state_column}) *number = r.next();
  for (Update::Input* tensor : {&p.x, &p.dt, &p.z}) *tensor = input(r);
  p.A = r.pointer<const void>();
  for (std::int64_t* stride : {&p.A_head, &p.A_row, &p.A_column}) *stride = r.next();
  for (View* tensor : {&p.B, &p.C}) *tensor = view(r);
  for (Update::Input* tensor : {&p.D, &p.bias}) *tensor = input(r);
  p.out = r.pointer<void>();
  r.finish();
  call(&update, p);
}

}  // namespace

void bind_scan(py::module_& m) {
  m.attr("scan_chunk") = kChunk;
  m.def("scan_forward", &scan_forward, "Forward pass of the selective scan");
  m.def("scan_backward", &scan_backward, "Backward pass of the selective scan");
  m.def("scan_state_update", &state_update, "One step of the selective scan; the state is overwritten");
}
