// Binds attention and its gradients.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <utility>

#include "attention/params.h"
#include "bindings/call.h"

namespace {

using namespace cvmk::attention;
using cvmk::Dtype;
using cvmk::bindings::Arguments;
using cvmk::bindings::Tensor;

// [batch, heads, rows, n], or packed [rows, heads, n]; the last dimension is contiguous.
Matrix matrix(const Tensor& x, const char* name) {
  if (!x) return Matrix{};
  if (x.dims == 3) return Matrix{x.data(), 0, x.stride(1), x.stride(0)};
  x.expect(4, name);
  return Matrix{x.data(), x.stride(0), x.stride(1), x.stride(2)};
}

// A matrix of the dtype of the call; without data for None.
Matrix optional_matrix(Arguments& in, Dtype dtype, const char* name) {
  const Tensor x = in.optional(name);
  in.data_of<void>(x, dtype, name);
  return matrix(x, name);
}

// One number a row, contiguous: [batch, heads, rows], packed [heads, rows]; without data for None.
Matrix statistics(Arguments& in, std::int64_t heads, std::int64_t rows, const char* name) {
  const Tensor x = in.optional(name);
  return x ? Matrix{in.data_of<float>(x, cvmk::kFloat32, name), heads * rows, rows, 1} : Matrix{};
}

Integers integers(const Arguments& in, const Tensor& x, const char* name) {
  if (!x) return Integers{};
  x.expect(1, name);
  return Integers{x.data(), x.stride(0), in.counting(x, name)};
}

// Offsets of packed sequences, which rise within a tensor of `total` rows; cvmk/ops/attention.py::check_offsets says the same.
Integers offsets(const Tensor& x, const Arguments& in, std::int64_t total, const char* name) {
  const Integers found = integers(in, x, name);
  std::int64_t last = 0;
  for (std::int64_t i = 0; x && i < x.size(0); ++i) {
    const std::int64_t offset = cvmk::integer_at(found.data, found.dtype, i * found.stride);
    if (offset < last || offset > total) {
      const std::string why = offset < last ? "it is less than " + std::to_string(last) : "the tensor has " + std::to_string(total) + " rows";
      throw std::invalid_argument(std::string(name) + " must rise from 0 or more to " + std::to_string(total) + " at most, and " + name + "[" + std::to_string(i) + "] is " +
                                  std::to_string(offset) + ": " + why);
    }
    last = offset;
  }
  return found;
}

// Broadcast to four dimensions from the right.
Bias bias(const Arguments& in, const Tensor& x) {
  Bias b{};
  if (!x) return b;
  b.data = x.data();
  b.dtype = in.floating(x, "bias", cvmk::kFloat64 + 1);
  for (int i = 0; i < 4; ++i) {
    const int at = x.dims - 4 + i;
    b.size[i] = at < 0 ? 1 : x.size(at);
    b.stride[i] = b.size[i] > 1 ? x.stride(at) : 0;
  }
  return b;
}

// The fields of `Call` in cvmk/ops/attention.py, in their order.
void read_call(Arguments in, Params& p) {
  const Tensor q = in.tensor("q"), k = in.tensor("k"), v = in.optional("v");
  p.bias = bias(in, in.optional("bias"));
  p.key_lengths = integers(in, in.optional("key_lengths"), "key_lengths");
  p.query_start = integers(in, in.optional("query_start"), "query_start");
  const Tensor cu_q = in.optional("cu_seqlens_q"), cu_k = in.optional("cu_seqlens_k");
  in.next();  // dropout_seed
  p.window_left = std::min(in.integer(), kFar);
  p.window_right = std::min(in.integer(), kFar);
  p.softcap = in.number();
  p.scale = in.number();
  in.next();  // dropout_p
  in.finish();
  const int rows = cu_q ? 0 : 2;
  q.expect(cu_q ? 3 : 4, "q");
  k.expect(cu_q ? 3 : 4, "k");
  p.sequences = cu_q ? cu_q.size(0) - 1 : -1;
  p.cu_q = offsets(cu_q, in, q.size(rows), "cu_seqlens_q");
  p.cu_k = offsets(cu_k, in, k.size(rows), "cu_seqlens_k");
  p.dtype = in.floating(q, "q");
  in.data_of<void>(k, p.dtype, "k");
  in.data_of<void>(v, p.dtype, "v");
  p.batch = cu_q ? 1 : q.size(0);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.rows = q.size(rows);
  p.keys = k.size(rows);
  p.d = q.size(-1);
  p.dv = v ? v.size(-1) : 0;
  p.q = matrix(q, "q");
  p.k = matrix(k, "k");
  p.v = matrix(v, "v");
}

// The call, out, lse, and the dropout's factor, key and limit.
void read_common(Arguments& in, Params& p) {
  read_call(in.fields(), p);
  p.out = optional_matrix(in, p.dtype, "out");
  p.lse = statistics(in, p.heads, p.rows, "lse");
  p.keep_factor = in.number();
  p.dropout_key = static_cast<std::uint32_t>(in.integer());
  p.dropout_limit = static_cast<std::uint32_t>(in.integer());
}

// (q, k, lse, kl, its gradient, scale): the last argument of a distillation.
void read_teacher(Arguments& in, Params& p) {
  if (in.done()) return;
  Arguments fields = in.fields();
  const Tensor q = fields.tensor("teacher_q"), k = fields.tensor("teacher_k");
  q.expect(4, "teacher_q");
  k.expect(4, "teacher_k");
  for (const auto& [x, name] : {std::pair{&q, "teacher_q"}, std::pair{&k, "teacher_k"}}) fields.data_of<void>(*x, p.dtype, name);
  Teacher& t = p.teacher;
  t.heads = q.size(1);
  t.kv_heads = k.size(1);
  t.d = q.size(3);
  t.groups = std::gcd(p.heads, t.heads);
  t.q = matrix(q, "teacher_q");
  t.k = matrix(k, "teacher_k");
  t.lse = statistics(fields, t.heads, p.rows, "teacher_lse");
  t.kl = statistics(fields, p.heads, p.rows, "kl");
  t.grad_kl = statistics(fields, p.heads, p.rows, "grad_kl");
  t.scale = fields.number();
  fields.finish();
}

void forward(Arguments& in) {
  Params p{};
  read_common(in, p);
  read_teacher(in, p);
  cvmk::bindings::run(kernels(p.dtype).forward, in, p);
}

void backward(Arguments& in) {
  Params p{};
  read_common(in, p);
  p.grad_out = optional_matrix(in, p.dtype, "grad_out");
  p.grad_lse = statistics(in, p.heads, p.rows, "grad_lse");
  p.dq = optional_matrix(in, p.dtype, "dq");
  p.dk = optional_matrix(in, p.dtype, "dk");
  p.dv_ = optional_matrix(in, p.dtype, "dv");
  p.bias.grad = in.data_of<void>(in.optional("dbias"), p.bias.dtype, "dbias");
  read_teacher(in, p);
  cvmk::bindings::run(kernels(p.dtype).backward, in, p);
}

}  // namespace

void bind_attention(pybind11::module_& m) {
  using cvmk::bindings::add;
  add<&forward>(m, "attention_forward", "flash_attention",
                "a Call of cvmk.ops.attention, out, lse, 1 / (1 - dropout_p), dropout key and limit; then, for a distillation, (q, k, lse, kl, its gradient, "
                "scale) of the teacher");
  add<&backward>(m, "attention_backward", "flash_attention",
                 "the arguments of attention_forward up to the limit, the gradients of out and lse, those of q, k, v and bias to write; then the teacher");
}
