// kd_loss: the losses of all rows, and their gradients. Rows are handed to threads a few at a time; a row is one thread's.

#include <stdlib.h>

#include "common/threads.h"
#include "distill/one_pass.inl"

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

// The losses and statistics of row i, 0 where it does not count.
template <typename Row>
CVMK_INLINE void losses_of(const Rows& in, int64_t i, float* kd, float* ce) {
  const int64_t y = in.target[i];
  if (y < 0) {
    kd[i] = ce[i] = 0;
    for (int k = 0; k < 5; ++k) in.stats[k * in.rows + i] = 0;
    return;
  }
  row_losses(in.terms, in.vocabulary, row_of<Row>(in.student, i), row_of<Row>(in.teacher, i), in.teacher.data != nullptr, y, in.stats + i, in.rows, kd + i,
             ce + i);
}

template <typename Row>
void all_losses(const LossPass& pass) {
  each_row(pass.in, [&](int64_t i) { losses_of<Row>(pass.in, i, pass.kd, pass.ce); });
}

// Whether the exponentials of the losses make the gradient too; nothing but the arguments of a row may decide.
template <typename Row>
CVMK_INLINE bool from_exponentials(const GradientPass& pass) {
  const Terms& terms = pass.in.terms;
  return Row::kKeepExponentials && pass.kd != nullptr && pass.with_kd && pass.in.teacher.data != nullptr && terms.divergence == kForwardKl &&
         (terms.temperature == 1.0f || terms.temperature == 2.0f);
}

template <typename Row>
void all_gradients(const GradientPass& pass) {
  const Rows& in = pass.in;
  const Logits to{pass.gradient, pass.gradient_stride, in.student.type};
  const Parts parts{pass.with_kd, pass.with_ce, pass.kd_scale, pass.ce_scale};
  const int64_t bytes = in.vocabulary * (in.student.type == kFloat32 ? 4 : 2);
  const bool streamed = in.rows * bytes > kStreamed && pass.gradient != in.student.data;
  const int64_t size = Exponentials::size(in.vocabulary);
  float* const places = from_exponentials<Row>(pass) ? static_cast<float*>(aligned_alloc(64, static_cast<size_t>(threads::limit() * size) * sizeof(float))) : nullptr;
  each_row(in, [&](int64_t i) {
    const Row s = row_of<Row>(in.student, i), t = row_of<Row>(in.teacher, i);
    const int64_t y = in.target[i];
    Row out = row_of<Row>(to, i);
    out.streamed = streamed;
    if (places != nullptr && y >= 0) {
      const auto row = in.terms.temperature == 1.0f ? &row_in_one_pass<kAtOne, Row, Row, Row> : &row_in_one_pass<kAtTwo, Row, Row, Row>;
      return row(in.terms, in.vocabulary, s, t, y, in.stats + i, in.rows, pass.kd + i, pass.ce + i, parts, out, places + threads::index() * size);
    }
    if (pass.kd != nullptr) losses_of<Row>(in, i, pass.kd, pass.ce);
    if (y < 0 || !(parts.with_kd || parts.with_ce)) {
      memset(out.p, 0, static_cast<size_t>(bytes));
      return;
    }
    row_gradient(in.terms, in.vocabulary, s, t, y, in.stats + i, in.rows, parts, out);
  });
  free(places);
}

template <typename Row>
void scale_as(const ScalePass& pass) {
  constexpr int64_t kItem = 65536;
  const Logits from{pass.from, 0, kFloat32}, to{pass.to, 0, pass.type};
  const bool streamed = pass.count * (pass.type == kFloat32 ? 4 : 2) > kStreamed && reinterpret_cast<uintptr_t>(pass.to) % 64 == 0;
  threads::each((pass.count + kItem - 1) / kItem, [&](int64_t item) {
    const Floats source = row_of<Floats>(from, 0);
    Row out = row_of<Row>(to, 0);
    out.streamed = streamed;
    const int64_t end = (item + 1) * kItem < pass.count ? (item + 1) * kItem : pass.count;
    vectors(item * kItem, end, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) { out.store(i, n, source.load(i, n, kind) * pass.factor, kind); });
    finish_streams();
  });
}

void scale(const ScalePass& pass) {
  if (pass.type == kFloat32) return scale_as<Floats>(pass);
  if (pass.type == kBFloat16) return scale_as<BFloats>(pass);
  scale_as<Any>(pass);
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
