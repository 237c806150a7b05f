#include "distill/loss.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "common/cpu_features.h"
#include "common/pages.h"
#include "common/scratch.h"

namespace cvmk::distill {
namespace {

std::size_t bytes(std::int64_t floats) { return static_cast<std::size_t>(floats) * sizeof(float); }

// Targets as the kernels take them, -1 where a row does not count, to `to` [rows]; returns how many count.
std::int64_t read_targets(const Loss& call, std::int64_t* to) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < call.rows; ++i) {
    const std::int64_t y = integer_at(call.target, call.target_dtype, i);
    const bool valid = y != call.ignore_index;
    if (valid && (y < 0 || y >= call.vocabulary))
      throw std::invalid_argument("target holds " + std::to_string(y) + ", which is neither in the vocabulary 0.." + std::to_string(call.vocabulary - 1) +
                                  " nor ignore_index (" + std::to_string(call.ignore_index) + ")");
    to[i] = valid ? y : -1;
    count += valid ? 1 : 0;
  }
  return count;
}

// The sum over the rows in their order, in double precision.
double sum(const float* values, std::int64_t n) {
  double total = 0;
  for (std::int64_t i = 0; i < n; ++i) total += static_cast<double>(values[i]);
  return total;
}

// What the sum over the rows is divided by.
double divisor_of(const float* normalizer, std::int64_t valid) {
  return normalizer != nullptr ? static_cast<double>(*normalizer) : static_cast<double>(valid > 1 ? valid : 1);
}

// Loss, T^2 D, CE and the divisor from the losses of the rows; a part of weight 0 is left out of the loss, for it may be infinite.
void write_totals(const Loss& call, const float* kd_rows, const float* ce_rows, double divisor, const Totals& to) {
  const double t = static_cast<double>(call.terms.temperature), alpha = call.alpha;
  const double kd = t * t * sum(kd_rows, call.rows) / divisor, ce = sum(ce_rows, call.rows) / divisor;
  *to.kd = static_cast<float>(kd);
  *to.ce = static_cast<float>(ce);
  *to.divisor = static_cast<float>(divisor);
  *to.loss = static_cast<float>(alpha == 0 ? ce : alpha == 1 ? kd : alpha * kd + (1 - alpha) * ce);
}

struct Scales {
  float kd = 0, ce = 0;
  bool with_kd = false, with_ce = false;
};

// What a row's divergence slope and cross-entropy gradient are multiplied by.
Scales scales_of(const Loss& call, const Upstream& g, const float* divisor, bool has_teacher) {
  Scales scales;
  const double alpha = call.alpha;
  const auto read = [](const float* x) { return x == nullptr ? 0.0 : static_cast<double>(*x); };
  scales.with_kd = has_teacher && ((g.loss != nullptr && alpha != 0) || g.kd != nullptr);
  scales.with_ce = (g.loss != nullptr && alpha != 1) || g.ce != nullptr;
  if (scales.with_kd)
    scales.kd = static_cast<float>(static_cast<double>(call.terms.temperature) * ((alpha != 0 ? alpha * read(g.loss) : 0.0) + read(g.kd)) / read(divisor));
  if (scales.with_ce) scales.ce = static_cast<float>(((alpha != 1 ? (1 - alpha) * read(g.loss) : 0.0) + read(g.ce)) / read(divisor));
  return scales;
}

// What is kept of the rows during a call.
struct RowPlaces {
  std::int64_t *target, *index;
  float *kd, *ce;

  RowPlaces(std::int64_t rows, Arena* arena)
      : target(arena->take<std::int64_t>(rows)), index(arena->take<std::int64_t>(rows)), kd(arena->take<float>(rows)), ce(arena->take<float>(rows)) {}
  static std::int64_t bytes(std::int64_t rows) {
    Arena count;
    RowPlaces(rows, &count);
    return count.used;
  }
};

}  // namespace

void kd_loss(const Loss& call, const Logits& student, const Logits& teacher, const float* normalizer, const Totals& totals, void* gradient,
             std::int64_t gradient_stride, const Team& team) {
  const Scratch scratch(RowPlaces::bytes(call.rows));
  Arena arena{scratch.data()};
  const RowPlaces places(call.rows, &arena);
  const double divisor = divisor_of(normalizer, read_targets(call, places.target));
  const Rows in{student, teacher, places.target, call.rows, call.vocabulary, call.stats, call.terms};
  if (gradient == nullptr) {
    run(kernels().losses, {in, places.kd, places.ce}, team);
  } else {
    const float one = 1, rounded = static_cast<float>(divisor);
    const Scales scales = scales_of(call, {&one, nullptr, nullptr}, &rounded, teacher.data != nullptr);
    run(kernels().gradients, {in, scales.kd, scales.ce, scales.with_kd, scales.with_ce, gradient, gradient_stride, places.kd, places.ce}, team);
  }
  write_totals(call, places.kd, places.ce, divisor, totals);
}

void kd_loss_gradient(const Loss& call, const Logits& student, const Logits& teacher, const Upstream& upstream, const float* divisor, void* gradient,
                      const Team& team) {
  const Scratch scratch(RowPlaces::bytes(call.rows));
  Arena arena{scratch.data()};
  const RowPlaces places(call.rows, &arena);
  read_targets(call, places.target);
  const Scales scales = scales_of(call, upstream, divisor, teacher.data != nullptr);
  const Rows in{student, teacher, places.target, call.rows, call.vocabulary, call.stats, call.terms};
  run(kernels().gradients, {in, scales.kd, scales.ce, scales.with_kd, scales.with_ce, gradient, call.vocabulary, nullptr, nullptr}, team);
}

void linear_kd_loss(const Loss& call, const Layer& student, const Layer& teacher, const float* normalizer, const Upstream& upstream, const float* divisor,
                    const Totals& totals, const LinearGradients& gradients, const Team& team) {
  const Scratch scratch(RowPlaces::bytes(call.rows));
  Arena arena{scratch.data()};
  const RowPlaces places(call.rows, &arena);
  LinearPass pass{};
  pass.student = student;
  pass.teacher = teacher;
  pass.index = places.index;
  pass.target = places.target;
  pass.count = read_targets(call, places.target);
  for (std::int64_t i = 0, at = 0; i < call.rows; ++i)
    if (places.target[i] >= 0) places.index[at++] = i;
  pass.rows = call.rows;
  pass.vocabulary = call.vocabulary;
  pass.terms = call.terms;
  const Scales scales = scales_of(call, upstream, divisor, teacher.hidden != nullptr);
  pass.with_kd = scales.with_kd;
  pass.with_ce = scales.with_ce;
  pass.kd_scale = scales.kd;
  pass.ce_scale = scales.ce;
  pass.stats = call.stats;
  pass.kd = places.kd;
  pass.ce = places.ce;
  pass.d_hidden = gradients.hidden;
  pass.d_weight = gradients.weight;
  pass.d_bias = gradients.bias;
  std::memset(places.kd, 0, bytes(call.rows));
  std::memset(places.ce, 0, bytes(call.rows));
  const bool nothing = pass.count == 0 || !(pass.with_kd || pass.with_ce);
  if (pass.count < call.rows) std::memset(pass.stats, 0, bytes(5 * call.rows));
  if (pass.d_hidden != nullptr && (nothing || pass.count < call.rows)) std::memset(pass.d_hidden, 0, bytes(call.rows * student.width));
  if (pass.d_weight != nullptr) advise_large_pages(pass.d_weight, call.vocabulary * student.width * static_cast<std::int64_t>(sizeof(float)));
  if (pass.d_weight != nullptr && nothing) std::memset(pass.d_weight, 0, bytes(call.vocabulary * student.width));
  if (pass.d_bias != nullptr && nothing) std::memset(pass.d_bias, 0, bytes(call.vocabulary));
  const Dispatch dispatched = dispatch();
  pass.pairs = dispatched.features.avx512_bf16;
  if (pass.count > 0) run(kernels(dispatched.level).linear, pass, team);
  if (totals.loss != nullptr) write_totals(call, places.kd, places.ce, divisor_of(normalizer, pass.count), totals);
}

}  // namespace cvmk::distill
