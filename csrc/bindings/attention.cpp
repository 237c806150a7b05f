// cvmk._native.attention_forward and attention_backward: pointers, sizes and strides in, a status checked.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <stdexcept>

#include "attention/attention.h"

namespace py = pybind11;

namespace {

using cvmk::attention::Bias;
using cvmk::attention::Integers;
using cvmk::attention::Matrix;
using cvmk::attention::Params;

// Numbers of a tuple, in turn.
class Reader {
 public:
  explicit Reader(PyObject* tuple) : tuple_(tuple), size_(PyTuple_GET_SIZE(tuple)) {}

  std::int64_t integer() {
    const std::int64_t value = PyLong_AsLongLong(next());
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }
  float number() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return static_cast<float>(value);
  }
  void* pointer() { return reinterpret_cast<void*>(integer()); }
  PyObject* next() {
    if (at_ >= size_) throw std::invalid_argument("too few arguments");
    return PyTuple_GET_ITEM(tuple_, at_++);
  }
  bool done() const { return at_ == size_; }

 private:
  PyObject* tuple_;
  Py_ssize_t size_, at_ = 0;
};

Matrix strided(Reader& in) {
  Matrix m{};
  m.data = in.pointer();
  m.batch = in.integer();
  m.head = in.integer();
  m.row = in.integer();
  return m;
}

// A fresh contiguous result: [batch, heads, rows, n], packed [rows, heads, n].
Matrix contiguous(Reader& in, bool packed, std::int64_t heads, std::int64_t rows, std::int64_t n) {
  return packed ? Matrix{in.pointer(), 0, n, heads * n} : Matrix{in.pointer(), heads * rows * n, rows * n, n};
}

// (pointer, stride, wide), or None.
Integers integers(Reader& in) {
  PyObject* object = in.next();
  if (object == Py_None) return Integers{nullptr, 0, 0};
  Reader fields(object);
  Integers x{};
  x.data = fields.pointer();
  x.stride = fields.integer();
  x.wide = fields.integer();
  return x;
}

// (pointer, gradient's pointer, dtype, 4 strides, 4 sizes), or None.
Bias bias(Reader& in) {
  PyObject* object = in.next();
  Bias x{};
  if (object == Py_None) return x;
  Reader fields(object);
  x.data = fields.pointer();
  x.grad = fields.pointer();
  x.dtype = fields.integer();
  for (std::int64_t& stride : x.stride) stride = fields.integer();
  for (std::int64_t& size : x.size) size = fields.integer();
  return x;
}

void common(Reader& in, Params& p) {
  p.dtype = in.integer();
  for (std::int64_t* size : {&p.batch, &p.heads, &p.kv_heads, &p.rows, &p.keys, &p.d, &p.dv, &p.sequences}) *size = in.integer();
  const bool packed = p.sequences >= 0;
  p.q = strided(in);
  p.k = strided(in);
  p.v = strided(in);
  p.out = contiguous(in, packed, p.heads, p.rows, p.dv);
  p.lse = Matrix{in.pointer(), p.heads * p.rows, p.rows, 1};
  p.bias = bias(in);
  p.key_lengths = integers(in);
  p.query_start = integers(in);
  p.cu_q = integers(in);
  p.cu_k = integers(in);
  p.window_left = in.integer();
  p.window_right = in.integer();
  p.softcap = in.number();
  p.scale = in.number();
  p.keep_factor = in.number();
  p.dropout_key = static_cast<std::uint32_t>(in.integer());
  p.dropout_limit = static_cast<std::uint32_t>(in.integer());
}

// (heads, kv_heads, d, groups, q, k, lse, kl, its gradient, scale): the last argument of a distillation.
void teacher(Reader& in, Params& p) {
  if (in.done()) return;
  Reader fields(in.next());
  cvmk::attention::Teacher& t = p.teacher;
  for (std::int64_t* size : {&t.heads, &t.kv_heads, &t.d, &t.groups}) *size = fields.integer();
  t.q = strided(fields);
  t.k = strided(fields);
  t.lse = Matrix{fields.pointer(), t.heads * p.rows, p.rows, 1};
  t.kl = Matrix{fields.pointer(), p.heads * p.rows, p.rows, 1};
  t.grad_kl = Matrix{fields.pointer(), p.heads * p.rows, p.rows, 1};
  t.scale = fields.number();
}

void run(int (*function)(const Params&), const Reader& in, const Params& p) {
  if (!in.done()) throw std::invalid_argument("too many arguments");
  int status = 0;
  {
    const py::gil_scoped_release release;
    status = function(p);
  }
  if (status == cvmk::attention::kNoMemory) throw std::bad_alloc();
}

void forward(const py::args& args) {
  Reader in(args.ptr());
  Params p{};
  common(in, p);
  teacher(in, p);
  run(cvmk::attention::forward, in, p);
}

void backward(const py::args& args) {
  Reader in(args.ptr());
  Params p{};
  common(in, p);
  const bool packed = p.sequences >= 0;
  p.grad_out = strided(in);
  p.grad_lse = Matrix{in.pointer(), p.heads * p.rows, p.rows, 1};
  p.dq = contiguous(in, packed, p.heads, p.rows, p.d);
  p.dk = contiguous(in, packed, p.kv_heads, p.keys, p.d);
  p.dv_ = contiguous(in, packed, p.kv_heads, p.keys, p.dv);
  teacher(in, p);
  run(cvmk::attention::backward, in, p);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", &forward, "The arguments are those of cvmk/ops/native/attention.py");
  m.def("attention_backward", &backward, "The arguments of attention_forward, then the gradients; both may end with a teacher");
}
