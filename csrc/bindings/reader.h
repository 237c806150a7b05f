// Reads the integers of one flat sequence one after the other: how kernels with many arguments are called.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

class Reader {
 public:
  explicit Reader(const pybind11::tuple& values) : values_(values) {}
  std::int64_t next() {
    if (at_ >= PyTuple_GET_SIZE(values_.ptr())) throw std::invalid_argument("too few numbers for a call");
    const std::int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(values_.ptr(), at_++));
    if (value == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    return value;
  }
  int integer() { return static_cast<int>(next()); }
  template <typename T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(next()));
  }
  void finish() const {
    if (at_ != PyTuple_GET_SIZE(values_.ptr())) throw std::invalid_argument("too many numbers for a call");
  }

 private:
  const pybind11::tuple& values_;
  pybind11::ssize_t at_ = 0;
};
