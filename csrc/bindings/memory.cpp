// Memory of the library that Python's buffer protocol shows: it is given back when the last object over it dies.
#include <pybind11/pybind11.h>

#include <cstddef>

#include "common/blocks.h"

namespace py = pybind11;

namespace {

class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : block_(cvmk::take_block(bytes)), bytes_(bytes) {}
  ~Buffer() { cvmk::give_block(block_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  py::buffer_info info() const { return {static_cast<unsigned char*>(block_.data), static_cast<py::ssize_t>(bytes_)}; }

 private:
  cvmk::Block block_;
  std::size_t bytes_;
};

}  // namespace

void bind_memory(py::module_& m) {
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), "Bytes of any value, from a block that is used again").def(py::init<std::size_t>()).def_buffer(&Buffer::info);
  m.def("kept_bytes", &cvmk::kept_bytes, "Bytes of blocks that wait for their next use");
}
