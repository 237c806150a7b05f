// Arguments of a call that are tensors, read in place: address, dtype, sizes and strides.
//
// The tensor's type offers DLPack's exchange table (PyTorch's does), so that neither its headers nor its version matter here, and a
// tensor costs some 20 ns where its address, shape and strides as Python objects cost 500.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace cvmk::bindings {

// DLTensor of DLPack 1 (github.com/dmlc/dlpack): sizes and strides count elements, and belong to the tensor.
struct Tensor {
  char* address;
  std::int32_t device, device_index, dims;
  std::uint8_t kind, bits;
  std::uint16_t lanes;
  const std::int64_t* sizes;
  const std::int64_t* strides;
  std::uint64_t offset;

  explicit operator bool() const { return sizes != nullptr; }
  void* data() const { return address == nullptr ? nullptr : address + offset; }
  std::int64_t size(int at) const { return sizes[at < 0 ? dims + at : at]; }
  std::int64_t stride(int at) const { return strides[at < 0 ? dims + at : at]; }
  void expect(int wanted, const char* name) const {
    if (dims != wanted) throw std::invalid_argument(std::string(name) + " has " + std::to_string(dims) + " dimensions, not " + std::to_string(wanted));
  }
};
static_assert(sizeof(Tensor) == 48);

// DLPackExchangeAPI, of which one function is used: it fills in what describes a tensor and owns nothing.
struct ExchangeTable {
  std::uint32_t major, minor;
  void *previous, *allocate, *from_object, *to_object;
  int (*view)(PyObject* object, Tensor* out);
  void* stream;
};

// The last two types are kept: tensors and parameters come mixed.
inline const ExchangeTable& exchange_table(PyTypeObject* type) {
  struct Known {
    PyTypeObject* type;
    const ExchangeTable* table;
  };
  static Known known[2] = {};  // guarded by the interpreter's lock, as all of this
  if (type == known[0].type) return *known[0].table;
  if (type == known[1].type) return *known[1].table;
  const auto capsule = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
  if (!capsule) throw pybind11::error_already_set();
  const auto* found = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (found == nullptr) throw pybind11::error_already_set();
  if (found->major != 1 || found->view == nullptr) throw std::runtime_error("the tensors' library speaks another version of DLPack than 1");
  Py_INCREF(type);  // or another type could come to stand at its address
  PyTypeObject* const gone = known[1].type;
  known[1] = known[0];
  known[0] = {type, found};
  Py_XDECREF(gone);
  return *found;
}

// The arguments of a call, in turn. Tensors are on the CPU, and None where they are absent.
class Arguments {
 public:
  explicit Arguments(PyObject* tuple) : tuple_(tuple), size_(PyTuple_GET_SIZE(tuple)) {}

  Tensor tensor() {
    PyObject* object = next();
    Tensor found{};
    if (object == Py_None) return found;
    if (exchange_table(Py_TYPE(object)).view(object, &found) != 0) throw pybind11::error_already_set();
    constexpr int kCpu = 1;
    if (found.device != kCpu) throw std::invalid_argument("a tensor is not on the CPU");
    return found;
  }
  std::int64_t integer() {
    const std::int64_t value = PyLong_AsLongLong(next());
    if (value == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    return value;
  }
  float number() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1.0 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    return static_cast<float>(value);
  }
  PyObject* next() {
    if (at_ >= size_) throw std::invalid_argument("too few arguments");
    return PyTuple_GET_ITEM(tuple_, at_++);
  }
  bool done() const { return at_ == size_; }
  void finish() const {
    if (!done()) throw std::invalid_argument("too many arguments");
  }

 private:
  PyObject* tuple_;
  Py_ssize_t size_, at_ = 0;
};

// float32, bfloat16, float16 and float64 as `first`, `first + 1`, ...
inline std::int64_t float_code(const Tensor& x, std::int64_t first) {
  constexpr int kFloat = 2, kBrain = 4;
  if (x.kind == kFloat && x.bits == 32) return first;
  if (x.kind == kBrain && x.bits == 16) return first + 1;
  if (x.kind == kFloat && x.bits == 16) return first + 2;
  if (x.kind == kFloat && x.bits == 64) return first + 3;
  throw std::invalid_argument("a tensor is not floating");
}

}  // namespace cvmk::bindings
