// kd_loss: the losses of all rows, and their gradients. Rows are handed to threads a few at a time; a row is one thread's.

#include "distill/one_pass.inl"

namespace cvmk::distill {
namespace {

// A gradient of more bytes than this is written past the caches, which it would leave before anybody reads it.
constexpr int64_t kStreamed = int64_t{8} << 20;

// Rows of a work item: about 64 thousand logits.
CVMK_INLINE int64_t item_rows(const Rows& in) { return in.vocabulary >= 65536 ? 1 : 65536 / in.vocabulary; }

// body(row, thread) for all rows.
template <typename Body>
CVMK_INLINE void each_row(const Rows& in, const Team& team, const Body& body) {
  const int64_t size = item_rows(in);
  team.each(pieces(in.rows, size), [&](int64_t item, int thread) {
    for (int64_t row = item * size, end = least((item + 1) * size, in.rows); row < end; ++row) body(row, thread);
    elements::finish_streams();
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
void all_losses(const LossPass& pass, const Team& team) {
  each_row(pass.in, team, [&](int64_t i, int) { losses_of<Row>(pass.in, i, pass.kd, pass.ce); });
}

// Whether the exponentials of the losses make the gradient too; nothing but the arguments of a row may decide.
template <typename Row>
CVMK_INLINE bool from_exponentials(const GradientPass& pass) {
  const Terms& terms = pass.in.terms;
  return Row::kKeepExponentials && pass.kd != nullptr && pass.with_kd && pass.in.teacher.data != nullptr && terms.divergence == kForwardKl &&
         (terms.temperature == 1.0f || terms.temperature == 2.0f);
}

// Exponentials of a row for each thread.
template <typename Row>
CVMK_INLINE int64_t places_of(const GradientPass& pass, const Team& team) {
  if (!from_exponentials<Row>(pass)) return 0;
  return least(pieces(pass.in.rows, item_rows(pass.in)), team.size) * Exponentials::size(pass.in.vocabulary);
}

template <typename Row>
void all_gradients(const GradientPass& pass, float* places, const Team& team) {
  const Rows& in = pass.in;
  const Logits to{pass.gradient, pass.gradient_stride, in.student.dtype};
  const Parts parts{pass.with_kd, pass.with_ce, pass.kd_scale, pass.ce_scale};
  const int64_t bytes = in.vocabulary * size_of(in.student.dtype), size = Exponentials::size(in.vocabulary);
  const bool streamed = in.rows * bytes > kStreamed && pass.gradient != in.student.data, kept = from_exponentials<Row>(pass);
  each_row(in, team, [&](int64_t i, int thread) {
    const Row s = row_of<Row>(in.student, i), t = row_of<Row>(in.teacher, i);
    const int64_t y = in.target[i];
    Row out = row_of<Row>(to, i);
    out.streamed = streamed;
    if (kept && y >= 0) {
      const auto row = in.terms.temperature == 1.0f ? &row_in_one_pass<kAtOne, Row, Row, Row> : &row_in_one_pass<kAtTwo, Row, Row, Row>;
      return row(in.terms, in.vocabulary, s, t, y, in.stats + i, in.rows, pass.kd + i, pass.ce + i, parts, out, places + thread * size);
    }
    if (pass.kd != nullptr) losses_of<Row>(in, i, pass.kd, pass.ce);
    if (y < 0 || !(parts.with_kd || parts.with_ce)) {
      memset(out.p, 0, static_cast<size_t>(bytes));
      return;
    }
    row_gradient(in.terms, in.vocabulary, s, t, y, in.stats + i, in.rows, parts, out);
  });
}

template <typename Row>
void scale_as(const ScalePass& pass, const Team& team) {
  constexpr int64_t kItem = 65536;
  const Logits from{pass.from, 0, kFloat32}, to{pass.to, 0, pass.dtype};
  const bool streamed = pass.count * size_of(pass.dtype) > kStreamed && reinterpret_cast<uintptr_t>(pass.to) % 64 == 0;
  team.each(pieces(pass.count, kItem), [&](int64_t item, int) {
    const Floats source = row_of<Floats>(from, 0);
    Row out = row_of<Row>(to, 0);
    out.streamed = streamed;
    const int64_t end = least((item + 1) * kItem, pass.count);
    vectors(item * kItem, end, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) { out.store(i, n, source.load(i, n, kind) * pass.factor, kind); });
    elements::finish_streams();
  });
}

CVMK_INLINE bool both(const Rows& in, Dtype dtype) { return in.student.dtype == dtype && (in.teacher.data == nullptr || in.teacher.dtype == dtype); }

// -- the kernels -----------------------------------------------------------------------------------------------------------------------
int64_t losses_scratch(const LossPass&, const Team&) { return 0; }
void run_losses(const LossPass& pass, char*, const Team& team) {
  if (both(pass.in, kFloat32)) return all_losses<Floats>(pass, team);
  if (both(pass.in, kBFloat16)) return all_losses<BFloats>(pass, team);
  all_losses<Any>(pass, team);
}

int64_t gradients_scratch(const GradientPass& pass, const Team& team) {
  return both(pass.in, kBFloat16) ? places_of<BFloats>(pass, team) * static_cast<int64_t>(sizeof(float)) : 0;
}
void run_gradients(const GradientPass& pass, char* scratch, const Team& team) {
  float* const places = reinterpret_cast<float*>(scratch);
  if (both(pass.in, kFloat32)) return all_gradients<Floats>(pass, places, team);
  if (both(pass.in, kBFloat16)) return all_gradients<BFloats>(pass, places, team);
  all_gradients<Any>(pass, places, team);
}

int64_t scale_scratch(const ScalePass&, const Team&) { return 0; }
void run_scale(const ScalePass& pass, char*, const Team& team) {
  if (pass.dtype == kFloat32) return scale_as<Floats>(pass, team);
  if (pass.dtype == kBFloat16) return scale_as<BFloats>(pass, team);
  scale_as<Any>(pass, team);
}

}  // namespace
}  // namespace cvmk::distill
