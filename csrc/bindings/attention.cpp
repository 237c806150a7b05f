// cvmk._native.attention_forward and attention_backward: tensors and numbers in, a status checked.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <numeric>

#include "attention/attention.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace {

using cvmk::attention::Bias;
using cvmk::attention::Integers;
using cvmk::attention::Matrix;
using cvmk::attention::Params;
using cvmk::bindings::Arguments;
using cvmk::bindings::Tensor;

// [batch, heads, rows, n], or packed [rows, heads, n]; the last dimension is contiguous.
Matrix matrix(const Tensor& x) {
  if (!x) return Matrix{};
  if (x.dims == 3) return Matrix{x.data(), 0, x.stride(1), x.stride(0)};
  x.expect(4, "a matrix");
  return Matrix{x.data(), x.stride(0), x.stride(1), x.stride(2)};
}

// One number a row, contiguous: [batch, heads, rows], packed [heads, rows].
Matrix statistics(const Tensor& x, std::int64_t heads, std::int64_t rows) { return x ? Matrix{x.data(), heads * rows, rows, 1} : Matrix{}; }

Integers integers(const Tensor& x) {
  if (!x) return Integers{};
  x.expect(1, "lengths");
  return Integers{x.data(), x.stride(0), x.bits == 64};
}

// Broadcast to four dimensions from the right.
Bias bias(const Tensor& x) {
  Bias b{};
  if (!x) return b;
  b.data = x.data();
  b.dtype = cvmk::bindings::float_code(x, 0);
  for (int i = 0; i < 4; ++i) {
    const int at = x.dims - 4 + i;
    b.size[i] = at < 0 ? 1 : x.size(at);
    b.stride[i] = b.size[i] > 1 ? x.stride(at) : 0;
  }
  return b;
}

// The fields of `Call` in cvmk/ops/attention.py, in their order.
void read(Arguments in, Params& p) {
  const Tensor q = in.tensor(), k = in.tensor(), v = in.tensor();
  p.bias = bias(in.tensor());
  p.key_lengths = integers(in.tensor());
  p.query_start = integers(in.tensor());
  const Tensor cu = in.tensor();
  p.cu_q = integers(cu);
  p.cu_k = integers(in.tensor());
  in.next();  // dropout_seed
  p.window_left = in.integer();
  p.window_right = in.integer();
  p.softcap = in.number();
  p.scale = in.number();
  in.next();  // dropout_p
  in.finish();
  p.sequences = cu ? cu.size(0) - 1 : -1;
  const int rows = cu ? 0 : 2;
  for (const Tensor* x : {&q, &k}) x->expect(cu ? 3 : 4, "q or k");
  p.dtype = cvmk::bindings::float_code(q, 0);
  p.batch = cu ? 1 : q.size(0);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.rows = q.size(rows);
  p.keys = k.size(rows);
  p.d = q.size(-1);
  p.dv = v ? v.size(-1) : 0;
  p.q = matrix(q);
  p.k = matrix(k);
  p.v = matrix(v);
}

// The call, out, lse, and the dropout's factor, key and limit.
void common(Arguments& in, Params& p) {
  read(Arguments(in.next()), p);
  p.out = matrix(in.tensor());
  p.lse = statistics(in.tensor(), p.heads, p.rows);
  p.keep_factor = in.number();
  p.dropout_key = static_cast<std::uint32_t>(in.integer());
  p.dropout_limit = static_cast<std::uint32_t>(in.integer());
}

// (q, k, lse, kl, its gradient, scale): the last argument of a distillation.
void teacher(Arguments& in, Params& p) {
  if (in.done()) return;
  Arguments fields(in.next());
  const Tensor q = fields.tensor(), k = fields.tensor();
  cvmk::attention::Teacher& t = p.teacher;
  t.heads = q.size(1);
  t.kv_heads = k.size(1);
  t.d = q.size(3);
  t.groups = std::gcd(p.heads, t.heads);
  t.q = matrix(q);
  t.k = matrix(k);
  t.lse = statistics(fields.tensor(), t.heads, p.rows);
  t.kl = statistics(fields.tensor(), p.heads, p.rows);
  t.grad_kl = statistics(fields.tensor(), p.heads, p.rows);
  t.scale = fields.number();
  fields.finish();
}

void run(int (*function)(const Params&), const Arguments& in, const Params& p) {
  in.finish();
  int status = 0;
  {
    const py::gil_scoped_release release;
    status = function(p);
  }
  if (status == cvmk::attention::kNoMemory) throw std::bad_alloc();
}

void forward(const py::args& args) {
  Arguments in(args.ptr());
  Params p{};
  common(in, p);
  teacher(in, p);
  run(cvmk::attention::forward, in, p);
}

void backward(const py::args& args) {
  Arguments in(args.ptr());
  Params p{};
  common(in, p);
  p.grad_out = matrix(in.tensor());
  p.grad_lse = statistics(in.tensor(), p.heads, p.rows);
  p.dq = matrix(in.tensor());
  p.dk = matrix(in.tensor());
  p.dv_ = matrix(in.tensor());
  p.bias.grad = in.tensor().data();
  teacher(in, p);
  run(cvmk::attention::backward, in, p);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", &forward,
        "a Call of cvmk.ops.attention, out, lse, 1 / (1 - dropout_p), dropout key and limit; then, for a distillation, (q, k, lse, kl, its gradient, scale) "
        "of the teacher");
  m.def("attention_backward", &backward,
        "the arguments of attention_forward up to the limit, the gradients of out and lse, those of q, k, v and bias to write; then the teacher");
}
