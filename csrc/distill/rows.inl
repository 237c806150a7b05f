// kd_loss: the losses of all rows, and their gradients. Rows are handed to threads a few at a time; a row is one thread's.

#include "common/threads.h"
#include "distill/gradients.inl"

namespace {
namespace distill {

// A gradient of more bytes than this is written past the caches, which it would leave before anybody reads it.
constexpr int64_t kStreamed = int64_t{8} << 20;

// body(row) for all rows; a work item is about 64 thousand logits.
template <typename Body>
CVMK_INLINE void each_row(const Rows& in, const Body& body) {
  const int64_t size = in.vocabulary >= 65536 ? 1 : 65536 / in.vocabulary;
  threads::each((in.rows + size - 1) / size, [&](int64_t item) {
    const int64_t end = (item + 1) * size < in.rows ? (item + 1) * size : in.rows;
    for (int64_t row = item * size; row < end; ++row) body(row);
    finish_streams();
  });
}

template <typename Row>
void all_losses(const LossPass& pass) {
  const Rows& in = pass.in;
  each_row(in, [&](int64_t i) {
    const int64_t y = in.target[i];
    if (y < 0) {
      pass.kd[i] = pass.ce[i] = 0;
      for (int k = 0; k < 5; ++k) in.stats[k * in.rows + i] = 0;
      return;
    }
    row_losses(in.terms, in.vocabulary, row_of<Row>(in.student, i), row_of<Row>(in.teacher, i), in.teacher.data != nullptr, y, in.stats + i, in.rows,
               pass.kd + i, pass.ce + i);
  });
}

template <typename Row>
void all_gradients(const GradientPass& pass) {
  const Rows& in = pass.in;
  const Logits to{pass.gradient, in.vocabulary, in.student.type};
  const Parts parts{pass.with_kd, pass.with_ce, pass.kd_scale, pass.ce_scale};
  const int64_t bytes = in.vocabulary * (in.student.type == kFloat32 ? 4 : 2);
  const bool streamed = in.rows * bytes > kStreamed;
  each_row(in, [&](int64_t i) {
    const int64_t y = in.target[i];
    if (y < 0 || !(parts.with_kd || parts.with_ce)) {
      memset(static_cast<char*>(pass.gradient) + i * bytes, 0, static_cast<size_t>(bytes));
      return;
    }
    Row out = row_of<Row>(to, i);
    out.streamed = streamed;
    row_gradient(in.terms, in.vocabulary, row_of<Row>(in.student, i), row_of<Row>(in.teacher, i), y, in.stats + i, in.rows, parts, out);
  });
}

CVMK_INLINE bool both(const Rows& in, int type) { return in.student.type == type && (in.teacher.data == nullptr || in.teacher.type == type); }

void losses(const LossPass& pass) {
  if (both(pass.in, kFloat32)) return all_losses<Floats>(pass);
  if (both(pass.in, kBFloat16)) return all_losses<BFloats>(pass);
  all_losses<Any>(pass);
}

void gradients(const GradientPass& pass) {
  if (both(pass.in, kFloat32)) return all_gradients<Floats>(pass);
  if (both(pass.in, kBFloat16)) return all_gradients<BFloats>(pass);
  all_gradients<Any>(pass);
}

}  // namespace distill
}  // namespace
