// The distillation losses, portable and at every level that the test is built with, against sums in double precision, and their places in poisoned memory.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/scratch.h"
#include "distill/loss.h"
#include "tests/check.h"

namespace {

using namespace cvmk;
using namespace cvmk::distill;

Team team() { return openmp_team(); }

struct Problem {
  std::int64_t rows, vocabulary;
  std::vector<float> student, teacher, stats, kd, ce, gradient;
  std::vector<std::int64_t> target;

  Problem(std::int64_t n, std::int64_t v)
      : rows(n), vocabulary(v), student(size(n * v)), teacher(size(n * v)), stats(size(5 * n), nan()), kd(size(n), nan()), ce(size(n), nan()),
        gradient(size(n * v), nan()), target(size(n)) {
    std::uint32_t state = 1;
    const auto next = [&state] { return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / 16777216.0f; };
    for (float& x : student) x = 6 * next() - 3;
    for (float& x : teacher) x = 6 * next() - 3;
    for (std::int64_t i = 0; i < n; ++i) target[size(i)] = i % 4 == 1 ? -1 : static_cast<std::int64_t>(next() * static_cast<float>(v));
  }
  static std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }
  static float nan() { return std::numeric_limits<float>::quiet_NaN(); }

  void run(float temperature) {
    const Rows in{{student.data(), vocabulary, kFloat32}, {teacher.data(), vocabulary, kFloat32}, target.data(), rows, vocabulary, stats.data(),
                  {temperature, kForwardKl, 0, 0}};
    cvmk::run(kernels().losses, {in, kd.data(), ce.data()}, team());
    cvmk::run(kernels().gradients, {in, 0.5f * temperature, 0.25f, true, true, gradient.data(), vocabulary, nullptr, nullptr}, team());
  }

  // Losses and gradients of one row after the other, the gradients over the student's logits or not.
  void run_at_once(float temperature, bool in_place) {
    const Rows in{{student.data(), vocabulary, kFloat32}, {teacher.data(), vocabulary, kFloat32}, target.data(), rows, vocabulary, stats.data(),
                  {temperature, kForwardKl, 0, 0}};
    cvmk::run(kernels().gradients, {in, 0.5f * temperature, 0.25f, true, true, in_place ? student.data() : gradient.data(), vocabulary, kd.data(), ce.data()},
              team());
  }

  double sum_exp(const std::vector<float>& x, std::int64_t row, double t) const {
    double total = 0;
    for (std::int64_t v = 0; v < vocabulary; ++v) total += std::exp(static_cast<double>(x[size(row * vocabulary + v)]) / t);
    return total;
  }

  void compare(double t) const {
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t y = target[size(i)];
      const double at_one = sum_exp(student, i, 1), of_q = sum_exp(student, i, t), of_p = sum_exp(teacher, i, t);
      double value = 0, worst = 0;
      for (std::int64_t v = 0; v < vocabulary; ++v) {
        const double z = static_cast<double>(student[size(i * vocabulary + v)]), w = static_cast<double>(teacher[size(i * vocabulary + v)]);
        const double q = std::exp(z / t) / of_q, p = std::exp(w / t) / of_p;
        value += p * std::log(p / q);
        const double exact = y < 0 ? 0 : 0.5 * t * (q - p) + 0.25 * (std::exp(z) / at_one - (v == y ? 1 : 0));
        worst = std::fmax(worst, std::fabs(static_cast<double>(gradient[size(i * vocabulary + v)]) - exact));
      }
      CHECK(worst < 4e-7);
      const double entropy = std::log(at_one) - static_cast<double>(y < 0 ? 0 : student[size(i * vocabulary + y)]);
      CHECK(std::fabs(static_cast<double>(kd[size(i)]) - (y < 0 ? 0 : value)) < 3e-6);
      CHECK(std::fabs(static_cast<double>(ce[size(i)]) - (y < 0 ? 0 : entropy)) < 3e-6);
    }
  }
};

void every_level_agrees_with_double_precision() {
  testing::at_every_level([] {
    for (const std::int64_t vocabulary : {1, 15, 16, 33, 2049})
      for (const float temperature : {1.0f, 2.0f, 3.0f}) {
        Problem problem(5, vocabulary);
        problem.run(temperature);
        problem.compare(static_cast<double>(temperature));
      }
  });
}

void losses_and_gradients_at_once_are_those_of_two_passes() {
  const auto same = [](const std::vector<float>& a, const std::vector<float>& b) { return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0; };
  testing::at_every_level([&same] {
    for (const std::int64_t vocabulary : {1, 33, 2049}) {
      Problem two(5, vocabulary), one(5, vocabulary), over(5, vocabulary);
      two.run(2);
      one.run_at_once(2, false);
      over.run_at_once(2, true);
      for (const Problem* problem : {&one, &over}) CHECK(same(problem->kd, two.kd) && same(problem->ce, two.ce) && same(problem->stats, two.stats));
      CHECK(same(one.gradient, two.gradient) && same(one.student, two.student) && same(over.student, two.gradient));
    }
  });
}

// Numbers times a factor, rounded once, at lengths that are no multiple of a vector and beyond a work item; nothing behind them is written.
void scaled_numbers_are_rounded_once() {
  for (const IsaLevel level : {IsaLevel::kBase, IsaLevel::kAvx2, IsaLevel::kAvx512, IsaLevel::kAmx}) {
    setenv("CVMK_CPU_ISA", level_name(level), 1);
    for (const std::int64_t count : {1, 17, 70001}) {
      const std::size_t n = Problem::size(count);
      std::vector<float> from(n), to(n + 1, Problem::nan());
      std::vector<std::uint16_t> half(n + 1, 0x7fff);
      for (std::size_t i = 0; i < n; ++i) from[i] = std::sin(static_cast<float>(i));
      cvmk::run(kernels().scale, {from.data(), to.data(), kFloat32, count, 0.3f}, team());
      cvmk::run(kernels().scale, {from.data(), half.data(), kBFloat16, count, 0.3f}, team());
      bool exact = true, near = true;
      for (std::size_t i = 0; i < n; ++i) {
        const float product = from[i] * 0.3f;
        const std::uint32_t bits = static_cast<std::uint32_t>(half[i]) << 16;
        float back;
        std::memcpy(&back, &bits, sizeof back);
        exact = exact && to[i] == product;
        near = near && std::fabs(back - product) <= std::fabs(product) / 256;
      }
      CHECK(exact);
      CHECK(near);
      CHECK(std::isnan(to[n]) && half[n] == 0x7fff);
    }
  }
  unsetenv("CVMK_CPU_ISA");
}

// linear_kd_loss: a student and a teacher of different widths, whose logits Problem's sums are made of; scratch and results hold NaN before.
struct LinearProblem {
  std::int64_t rows, vocabulary, width, teacher_width;
  std::vector<float> hidden, weight, bias, teacher_hidden, teacher_weight, stats, kd, ce, d_hidden, d_weight, d_bias;
  std::vector<std::int64_t> target, index;

  LinearProblem(std::int64_t n, std::int64_t v, std::int64_t d, std::int64_t other) : rows(n), vocabulary(v), width(d), teacher_width(other) {
    std::uint32_t state = 7;
    const auto numbers = [&state](std::int64_t count) {
      std::vector<float> x(Problem::size(count));
      for (float& value : x) value = 2 * static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / 16777216.0f - 1;
      return x;
    };
    hidden = numbers(n * d), weight = numbers(v * d), bias = numbers(v), teacher_hidden = numbers(n * other), teacher_weight = numbers(v * other);
    for (std::int64_t i = 0; i < n; ++i) {
      target.push_back(i % 4 == 1 ? -1 : i * 7 % v);
      if (target.back() >= 0) index.push_back(i);
    }
  }

  void run() {
    const auto blank = [](std::int64_t count) { return std::vector<float>(Problem::size(count), Problem::nan()); };
    stats = blank(5 * rows), kd = blank(rows), ce = blank(rows), d_hidden = blank(rows * width), d_weight = blank(vocabulary * width), d_bias = blank(vocabulary);
    LinearPass pass{};
    pass.pairs = cvmk::dispatch().features.avx512_bf16;
    pass.student = {hidden.data(), weight.data(), bias.data(), width, width, width, kFloat32, false};
    pass.teacher = {teacher_hidden.data(), teacher_weight.data(), nullptr, teacher_width, teacher_width, teacher_width, kFloat32, false};
    pass.index = index.data(), pass.target = target.data();
    pass.count = static_cast<std::int64_t>(index.size()), pass.rows = rows, pass.vocabulary = vocabulary;
    pass.terms = {2.0f, kForwardKl, 0, 0};
    pass.with_kd = pass.with_ce = true;
    pass.kd_scale = 1.0f, pass.ce_scale = 0.25f;
    pass.stats = stats.data(), pass.kd = kd.data(), pass.ce = ce.data();
    pass.d_hidden = d_hidden.data(), pass.d_weight = d_weight.data(), pass.d_bias = d_bias.data();
    cvmk::run(kernels().linear, pass, team());
  }

  static double product(const std::vector<float>& a, std::int64_t i, const std::vector<float>& b, std::int64_t j, std::int64_t d) {
    double total = 0;
    for (std::int64_t k = 0; k < d; ++k) total += static_cast<double>(a[Problem::size(i * d + k)]) * static_cast<double>(b[Problem::size(j * d + k)]);
    return total;
  }

  void compare() const {
    const std::size_t n = Problem::size(rows), v = Problem::size(vocabulary), d = Problem::size(width);
    std::vector<double> z(v), t(v), weights(v * d), biases(v);
    bool near = true;  // NaN is not
    const auto compare_one = [&near](float found, double exact) { near = near && std::fabs(static_cast<double>(found) - exact) < 5e-6; };
    for (std::size_t i = 0; i < n; ++i) {
      if (target[i] < 0) continue;
      double at_one = 0, of_q = 0, of_p = 0, value = 0;
      for (std::size_t j = 0; j < v; ++j) {
        const auto at = static_cast<std::int64_t>(i), entry = static_cast<std::int64_t>(j);
        z[j] = product(hidden, at, weight, entry, width) + static_cast<double>(bias[j]);
        t[j] = product(teacher_hidden, at, teacher_weight, entry, teacher_width);
        at_one += std::exp(z[j]), of_q += std::exp(z[j] / 2), of_p += std::exp(t[j] / 2);
      }
      std::vector<double> row(d);
      for (std::size_t j = 0; j < v; ++j) {
        const double q = std::exp(z[j] / 2) / of_q, p = std::exp(t[j] / 2) / of_p;
        value += p * std::log(p / q);
        const double grad = q - p + 0.25 * (std::exp(z[j]) / at_one - (static_cast<std::int64_t>(j) == target[i] ? 1 : 0));
        biases[j] += grad;
        for (std::size_t k = 0; k < d; ++k) {
          row[k] += grad * static_cast<double>(weight[j * d + k]);
          weights[j * d + k] += grad * static_cast<double>(hidden[i * d + k]);
        }
      }
      for (std::size_t k = 0; k < d; ++k) compare_one(d_hidden[i * d + k], row[k]);
      const double entropy = std::log(at_one) - z[static_cast<std::size_t>(target[i])];
      compare_one(kd[i], value);
      compare_one(ce[i], entropy);
    }
    for (std::size_t j = 0; j < v; ++j) compare_one(d_bias[j], biases[j]);
    for (std::size_t j = 0; j < v * d; ++j) compare_one(d_weight[j], weights[j]);
    CHECK(near);
    bool blank = true;
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t k = 0; target[i] < 0 && k < d; ++k) blank = blank && std::isnan(d_hidden[i * d + k]);
    CHECK(blank);
  }
};

void linear_layers_agree_with_double_precision() {
  testing::at_every_level([] {
    for (const std::int64_t vocabulary : {5, 300, 521})
      for (const std::int64_t rows : {3, 50, 210}) {
        LinearProblem problem(rows, vocabulary, 37, 70);
        problem.run();
        problem.compare();
      }
  });
}

// -- whole calls ------------------------------------------------------------------------------------------------------------------------
struct Whole {
  Problem rows{6, 21};
  std::vector<std::int64_t> target;
  float loss = NAN, kd = NAN, ce = NAN, divisor = NAN;

  Whole() : target(rows.target) {}
  Loss call(double alpha) const {
    return {target.data(), kInt64, rows.rows, rows.vocabulary, -1, {2.0f, kForwardKl, 0, 0}, alpha, const_cast<float*>(rows.stats.data())};
  }
  Logits student() const { return {rows.student.data(), rows.vocabulary, kFloat32}; }
  Logits teacher() const { return {rows.teacher.data(), rows.vocabulary, kFloat32}; }
  Totals totals() { return {&loss, &kd, &ce, &divisor}; }
};

// The totals are those of the rows over the normaliser, and the gradient along with them is that of the backward pass by 1.
void totals_and_scales() {
  for (const double alpha : {0.0, 0.25, 1.0})
    for (const float normalizer : {0.0f, 2.5f}) {
      Whole whole;
      whole.rows.run(2);
      double kd = 0, ce = 0, count = 0;
      for (std::size_t i = 0; i < whole.target.size(); ++i) {
        kd += static_cast<double>(whole.rows.kd[i]), ce += static_cast<double>(whole.rows.ce[i]);
        count += whole.target[i] >= 0 ? 1 : 0;
      }
      const double divisor = normalizer > 0 ? static_cast<double>(normalizer) : count;
      std::vector<float> along(whole.rows.gradient), apart(whole.rows.gradient), part(whole.rows.gradient);
      kd_loss(whole.call(alpha), whole.student(), whole.teacher(), normalizer > 0 ? &normalizer : nullptr, whole.totals(), along.data(), whole.rows.vocabulary,
              team());
      const auto near = [](float found, double exact) { return std::fabs(static_cast<double>(found) - exact) <= 1e-6 * std::fabs(exact); };
      CHECK(near(whole.divisor, divisor) && near(whole.kd, 4 * kd / divisor) && near(whole.ce, ce / divisor));
      CHECK(near(whole.loss, alpha * 4 * kd / divisor + (1 - alpha) * ce / divisor));
      const float one = 1, alpha_part = static_cast<float>(alpha), rest = static_cast<float>(1 - alpha);
      kd_loss_gradient(whole.call(alpha), whole.student(), whole.teacher(), {&one, nullptr, nullptr}, &whole.divisor, apart.data(), team());
      kd_loss_gradient(whole.call(alpha), whole.student(), whole.teacher(), {nullptr, &alpha_part, &rest}, &whole.divisor, part.data(), team());
      bool same = true;
      for (std::size_t i = 0; i < along.size(); ++i) same = same && std::fabs(along[i] - apart[i]) < 1e-7f && std::fabs(part[i] - apart[i]) < 1e-7f;
      CHECK(same);
    }
}

void targets_outside_of_the_vocabulary_are_refused() {
  Whole whole;
  std::vector<std::int32_t> narrow(whole.target.begin(), whole.target.end());
  Loss call = whole.call(0.5);
  call.target = narrow.data(), call.target_dtype = kInt32;
  kd_loss(call, whole.student(), whole.teacher(), nullptr, whole.totals(), nullptr, 0, team());
  const float loss = whole.loss;
  kd_loss(whole.call(0.5), whole.student(), whole.teacher(), nullptr, whole.totals(), nullptr, 0, team());
  CHECK(loss == whole.loss);
  for (const std::int64_t wrong : {std::int64_t{21}, std::int64_t{-2}}) {
    whole.target[3] = wrong;
    std::string text;
    try {
      kd_loss(whole.call(0.5), whole.student(), whole.teacher(), nullptr, whole.totals(), nullptr, 0, team());
    } catch (const std::invalid_argument& error) {
      text = error.what();
    }
    CHECK(text == "target holds " + std::to_string(wrong) + ", which is neither in the vocabulary 0..20 nor ignore_index (-1)");
  }
}

}  // namespace

int main() {
  every_level_agrees_with_double_precision();
  losses_and_gradients_at_once_are_those_of_two_passes();
  scaled_numbers_are_rounded_once();
  linear_layers_agree_with_double_precision();
  totals_and_scales();
  targets_outside_of_the_vocabulary_are_refused();
  return cvmk::testing::check_result();
}
