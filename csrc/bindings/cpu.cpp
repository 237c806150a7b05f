// The module cvmk._native: the CPU feature table and the kernels, bound without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "sketch/sketch.h"

namespace py = pybind11;
using namespace py::literals;

void bind_attention(py::module_& m);
void bind_conv(py::module_& m);
void bind_distill(py::module_& m);
void bind_embed(py::module_& m);
void bind_engine(py::module_& m);
void bind_gemm(py::module_& m);
void bind_linear(py::module_& m);
void bind_memory(py::module_& m);
void bind_norm(py::module_& m);
void bind_optimizer(py::module_& m);
void bind_scan(py::module_& m);

namespace {

using cvmk::sketch::Priority;
using cvmk::sketch::Sketch;
using cvmk::sketch::State;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void check_flat(const py::array& array, const char* name) {
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one dimension");
}

Array<std::uint64_t> to_array(const std::vector<std::uint64_t>& values) {
  return Array<std::uint64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::vector<std::uint64_t> to_vector(const Array<std::uint64_t>& values) {
  check_flat(values, "a state array");
  return {values.data(), values.data() + values.size()};
}

void add(Sketch& sketch, const Array<std::uint64_t>& ids) {
  check_flat(ids, "ids");
  const std::uint64_t* data = ids.data();
  const auto n = static_cast<std::size_t>(ids.size());
  const py::gil_scoped_release release;
  sketch.add(data, n);
}

void add_packed(Sketch& sketch, const Array<std::uint8_t>& buffer, const Array<std::int64_t>& offsets) {
  check_flat(buffer, "the buffer");
  check_flat(offsets, "offsets");
  const std::uint8_t* data = buffer.data();
  const std::int64_t* starts = offsets.data();
  const auto size = static_cast<std::int64_t>(buffer.size());
  const auto n = static_cast<std::size_t>(offsets.size());
  const py::gil_scoped_release release;
  bool valid = n > 0 && starts[0] >= 0 && starts[n - 1] <= size;
  for (std::size_t i = 1; valid && i < n; ++i) valid = starts[i - 1] <= starts[i];
  if (!valid) throw std::invalid_argument("offsets must rise from 0 or more to at most the length of the buffer");
  sketch.add_packed(data, starts, n - 1);
}

// The list keeps the items alive, and the interpreter lock keeps the list as it is.
void add_items(Sketch& sketch, const py::list& items) {
  std::vector<cvmk::sketch::Bytes> spans;
  spans.reserve(items.size());
  for (const py::handle item : items) {
    const char* data = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_Check(item.ptr())) {
      data = PyBytes_AS_STRING(item.ptr());
      size = PyBytes_GET_SIZE(item.ptr());
    } else if (PyUnicode_Check(item.ptr())) {
      data = PyUnicode_AsUTF8AndSize(item.ptr(), &size);
      if (data == nullptr) throw py::error_already_set();
    } else {
      throw py::type_error(std::string("items must be bytes or str, not ") + Py_TYPE(item.ptr())->tp_name);
    }
    spans.push_back({reinterpret_cast<const unsigned char*>(data), static_cast<std::size_t>(size)});
  }
  sketch.add_items(spans.data(), spans.size());
}

py::dict to_dict(const Sketch& sketch) {
  State state;
  {
    const py::gil_scoped_release release;
    state = sketch.state();
  }
  py::object items = py::none();
  if (state.holds_bytes) {
    py::list list;
    for (const std::string& item : state.items) list.append(py::bytes(item));
    items = list;
  }
  return py::dict("seen"_a = state.seen, "limit"_a = state.limit, "ids"_a = to_array(state.ids), "priorities"_a = to_array(state.priorities),
                  "counts"_a = to_array(state.counts), "items"_a = items);
}

State from_dict(const py::dict& dict) {
  State state;
  state.seen = dict["seen"].cast<std::uint64_t>();
  state.limit = dict["limit"].cast<std::uint64_t>();
  state.ids = to_vector(dict["ids"].cast<Array<std::uint64_t>>());
  state.priorities = to_vector(dict["priorities"].cast<Array<std::uint64_t>>());
  state.counts = to_vector(dict["counts"].cast<Array<std::uint64_t>>());
  const py::object items = dict["items"];
  state.holds_bytes = !items.is_none();
  if (state.holds_bytes) state.items = items.cast<std::vector<std::string>>();
  return state;
}

void bind_sketch(py::module_& m) {
  py::class_<Sketch>(m, "Sketch", "The native part of cvmk.ops.CVMSketch")
      .def(py::init([](std::uint64_t capacity, bool hashed, std::uint64_t seed) {
             return new Sketch(capacity, hashed ? Priority::kHash : Priority::kRandom, seed);
           }),
           "capacity"_a, "hashed"_a, "seed"_a)
      .def("add", &add, "ids"_a.noconvert())
      .def("add_items", &add_items, "items"_a)
      .def("add_packed", &add_packed, "buffer"_a.noconvert(), "offsets"_a.noconvert())
      .def("merge", [](Sketch& self, const Sketch& other) { self.merge(other.state()); }, py::call_guard<py::gil_scoped_release>())
      .def("state", &to_dict)
      .def("restore", [](Sketch& self, const py::dict& state) { self.restore(from_dict(state)); })
      .def("__len__", &Sketch::size, py::call_guard<py::gil_scoped_release>())
      .def("seen", &Sketch::seen, py::call_guard<py::gil_scoped_release>())
      .def("limit", &Sketch::limit, py::call_guard<py::gil_scoped_release>());
}

py::dict features() {
  py::dict result;
  for (const auto& [name, present] : cvmk::cpu_feature_list(cvmk::cpu_features())) result[py::str(name)] = present;
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of cvmk";
  m.attr("version") = CVMK_VERSION;
  m.def("cpu_features", &features, "Instruction sets by name that the processor has and the operating system saves");
  m.def("emulates_amx", &cvmk::emulates_amx, "Whether this build, which is for tests, computes with AVX-512 what AMX would");
  m.def("detected_level", [] { return cvmk::level_name(cvmk::level_of(cvmk::cpu_features())); }, "The level of the processor");
  m.def("dispatch_level", [] { return cvmk::level_name(cvmk::dispatch_level()); }, "The level of the processor, capped by CVMK_CPU_ISA");
  bind_sketch(m);
  bind_attention(m);
  bind_conv(m);
  bind_distill(m);
  bind_embed(m);
  bind_engine(m);
  bind_gemm(m);
  bind_linear(m);
  bind_memory(m);
  bind_norm(m);
  bind_optimizer(m);
  bind_scan(m);
}
