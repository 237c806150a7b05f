// Binds the selective scan and its single step. Arguments come as one flat sequence of integers.
#include <pybind11/pybind11.h>

#include <new>

#include "bindings/scan_arguments.h"

namespace py = pybind11;

namespace {

using namespace cvmk::scan;

template <typename Arguments>
void call(Arguments (*read)(Reader&), int (*kernel)(const Arguments&), const py::tuple& values) {
  Reader r(values);
  const Arguments arguments = read(r);
  r.finish();
  int status = 0;
  {
    const py::gil_scoped_release release;
    status = kernel(arguments);
  }
  if (status != 0) throw std::bad_alloc();
}

void scan_forward(const py::tuple& values) { call(&read_forward, &forward, values); }
void scan_backward(const py::tuple& values) { call(&read_backward, &backward, values); }
void state_update(const py::tuple& values) { call(&read_update, &update, values); }

}  // namespace

void bind_scan(py::module_& m) {
  m.attr("scan_chunk") = kChunk;
  m.def("scan_forward", &scan_forward, "Forward pass of the selective scan");
  m.def("scan_backward", &scan_backward, "Backward pass of the selective scan");
  m.def("scan_state_update", &state_update, "One step of the selective scan; the state is overwritten");
}
