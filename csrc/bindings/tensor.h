// One way over the border: the arguments of a call, tensors among them, read in place.
//
// A tensor's type offers DLPack's exchange table (PyTorch's does), so that neither its headers nor its version matter here, and a tensor costs
// some 20 ns where its address, shape and strides as Python objects cost 500. `add` makes a function of the module that is called with its
// arguments as they lie on the interpreter's stack.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/dtype.h"

namespace cvmk::bindings {

enum Device : std::int32_t { kCpu = 1, kCuda = 2 };  // as DLPack numbers them

// DLTensor of DLPack 1 (github.com/dmlc/dlpack): sizes and strides count elements, and belong to the tensor.
struct Tensor {
  char* address;
  std::int32_t device, device_index, dims;
  std::uint8_t kind, bits;
  std::uint16_t lanes;
  const std::int64_t* sizes;
  const std::int64_t* strides;
  std::uint64_t offset;

  explicit operator bool() const { return sizes != nullptr; }  // false where the argument was None
  void* data() const { return address == nullptr ? nullptr : address + offset; }
  Dtype dtype() const { return sizes == nullptr ? kNoDtype : dtype_of_dlpack(kind, bits, lanes); }
  std::int64_t size(int at) const { return sizes[at < 0 ? dims + at : at]; }
  std::int64_t stride(int at) const { return strides[at < 0 ? dims + at : at]; }
  bool is_contiguous() const {
    std::int64_t expected = 1;
    bool dense = true;
    for (int i = dims - 1; i >= 0; --i) {
      dense &= sizes[i] == 1 || strides[i] == expected;
      expected *= sizes[i];
    }
    return dense || expected == 0;
  }
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

// Null where the type is not a tensor's. The last two types are kept: tensors and parameters come mixed.
inline const ExchangeTable* exchange_table(PyTypeObject* type) {
  struct Known {
    PyTypeObject* type;
    const ExchangeTable* table;
  };
  static Known known[2] = {};  // guarded by the interpreter's lock, as all of this
  if (type == known[0].type) return known[0].table;
  if (type == known[1].type) return known[1].table;
  const auto capsule = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* found = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (found == nullptr) throw pybind11::error_already_set();
  if (found->major != 1 || found->view == nullptr) throw std::runtime_error("the tensors' library speaks another version of DLPack than 1");
  Py_INCREF(type);  // or another type could come to stand at its address
  PyTypeObject* const gone = known[1].type;
  known[1] = known[0];
  known[0] = {type, found};
  Py_XDECREF(gone);
  return found;
}

// Whether a tensor with elements has no memory behind them: a zero tensor, or one whose storage was given back (resized to nothing, as FSDP
// does). The address is then the offset into a storage that begins at 0. No allocator hands out addresses below 2^40 but for programs that are
// not position-independent and small address spaces: there the tensor is asked for its offset.
inline bool has_no_memory(PyObject* object, const Tensor& x) {
  const auto address = reinterpret_cast<std::uintptr_t>(x.address) + x.offset;
  if (address >> 40 != 0) return false;
  for (int i = 0; i < x.dims; ++i)
    if (x.sizes[i] == 0) return false;
  if (address == 0) return true;
  const auto offset = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethod(object, "storage_offset", nullptr));
  if (!offset) throw pybind11::error_already_set();
  return offset.cast<std::uintptr_t>() * (x.bits / 8u) == address;
}

// The arguments of a call, in turn. Errors name the op and the argument.
class Arguments {
 public:
  Arguments(const char* op, PyObject* const* values, Py_ssize_t count, Device device = kCpu) : op_(op), values_(values), size_(count), device_(device) {}

  Tensor tensor(const char* name) {
    PyObject* object = next();
    Tensor found{};
    const ExchangeTable* const table = exchange_table(Py_TYPE(object));
    if (table == nullptr) throw pybind11::type_error(about(name) + "must be a tensor, not a " + Py_TYPE(object)->tp_name);
    if (table->view(object, &found) != 0) refuse(name);
    if (found.device != device_) throw std::invalid_argument(about(name) + "is not on the " + (device_ == kCpu ? "CPU" : "GPU") + "; move it there");
    if (device_index_ < 0) device_index_ = found.device_index;
    else if (found.device_index != device_index_) throw std::invalid_argument(about(name) + "is on another device than the tensors before it; move it there");
    if (has_no_memory(object, found))
      throw std::runtime_error(about(name) + "has no memory behind it: its storage was given back, or it is a zero tensor; fill the storage again, or pass a copy");
    return found;
  }
  // An empty Tensor for None.
  Tensor optional(const char* name) {
    if (at_ < size_ && values_[at_] == Py_None) {
      ++at_;
      return {};
    }
    return tensor(name);
  }

  // Its data where the type is the one that the kernel reads; null for None.
  template <typename T>
  T* data_of(const Tensor& x, Dtype wanted, const char* name) const {
    if (x && x.dtype() != wanted) throw std::invalid_argument(about(name) + "is " + name_of(x.dtype()) + ", not " + name_of(wanted));
    return static_cast<T*>(x.data());
  }
  // Its type where that is one of the first `count` of Dtype; kFloat32 for None.
  Dtype floating(const Tensor& x, const char* name, int count = kFloat16 + 1) const {
    if (!x) return kFloat32;
    const Dtype found = x.dtype();
    if (found < 0 || found >= count) throw std::invalid_argument(about(name) + "is of a type that the kernels do not read (" + name_of(found) + ")");
    return found;
  }
  // Its type where that is one of the two that count and place; kInt64 for None.
  Dtype counting(const Tensor& x, const char* name) const {
    const Dtype found = x ? x.dtype() : kInt64;
    if (found != kInt32 && found != kInt64) throw std::invalid_argument(about(name) + "is " + name_of(found) + ", not int32 or int64");
    return found;
  }

  std::int64_t integer() {
    const std::int64_t value = PyLong_AsLongLong(next());
    if (value == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    return value;
  }
  float number() { return static_cast<float>(real()); }
  double real() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1.0 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    return value;
  }
  // The arguments within one that is a tuple.
  Arguments fields() {
    PyObject* const object = next();
    if (!PyTuple_Check(object)) throw pybind11::type_error(std::string(op_) + ": a group of arguments must be a tuple");
    return {op_, &PyTuple_GET_ITEM(object, 0), PyTuple_GET_SIZE(object), device_};
  }
  PyObject* next() {
    if (at_ >= size_) throw std::invalid_argument(std::string(op_) + ": too few arguments");
    return values_[at_++];
  }
  bool done() const { return at_ == size_; }
  void finish() const {
    if (!done()) throw std::invalid_argument(std::string(op_) + ": too many arguments");
  }

  // Of the tensors read so far.
  int device_index() const { return device_index_ < 0 ? 0 : device_index_; }
  // How errors begin: "op: name ".
  std::string about(const char* name) const { return std::string(op_) + ": " + name + " "; }

 private:
  [[noreturn]] void refuse(const char* name) const {
    const pybind11::error_already_set error;
    const std::string text = pybind11::str(error.value()).cast<std::string>();
    throw std::runtime_error(about(name) + "is no dense tensor with memory of its own: " + text.substr(0, text.find('\n')));
  }

  const char* op_;
  PyObject* const* values_;
  Py_ssize_t size_, at_ = 0;
  Device device_;
  std::int32_t device_index_ = -1;
};

// A function of a module: F takes Arguments& and returns nothing or an integer.
template <auto F>
struct Entry {
  static inline const char* op = "";
  static inline PyMethodDef method{};
  static inline Device device = kCpu;

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t count) noexcept {
    try {
      Arguments in(op, values, count, device);
      if constexpr (std::is_void_v<decltype(F(in))>) {
        F(in);
        Py_RETURN_NONE;
      } else {
        return PyLong_FromLongLong(F(in));
      }
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const pybind11::builtin_exception& error) {
      error.set_error();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }
};

// module.name(...) calls F with the arguments of `op`, which are on `device`.
template <auto F>
void add(pybind11::module_& module, const char* name, const char* op, const char* doc, Device device = kCpu) {
  using Self = Entry<F>;
  Self::op = op;
  Self::device = device;
  Self::method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Self::call)), METH_FASTCALL, doc};
  const pybind11::object home = module.attr("__name__");
  PyObject* const function = PyCFunction_NewEx(&Self::method, nullptr, home.ptr());
  if (function == nullptr) throw pybind11::error_already_set();
  module.attr(name) = pybind11::reinterpret_steal<pybind11::object>(function);
}

}  // namespace cvmk::bindings
