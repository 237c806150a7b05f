// The distillation losses, portable and at every level that the test is built with, against sums in double precision, and their places in poisoned memory.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "common/cpu_features.h"
#include "distill/distill.h"
#include "tests/check.h"

namespace {

using namespace cvmk;
using namespace cvmk::distill;

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
    losses({in, kd.data(), ce.data()});
    gradients({in, 0.5f * temperature, 0.25f, true, true, gradient.data()});
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

// Numbers times a factor, rounded once, at lengths that are no multiple of a vector and beyond a work item; nothing behind them is written.
void scaled_numbers_are_rounded_once() {
  for (const IsaLevel level : {IsaLevel::kBase, IsaLevel::kAvx2, IsaLevel::kAvx512, IsaLevel::kAmx}) {
    setenv("CVMK_CPU_ISA", level_name(level), 1);
    for (const std::int64_t count : {1, 17, 70001}) {
      const std::size_t n = Problem::size(count);
      std::vector<float> from(n), to(n + 1, Problem::nan());
      std::vector<std::uint16_t> half(n + 1, 0x7fff);
      for (std::size_t i = 0; i < n; ++i) from[i] = std::sin(static_cast<float>(i));
      scale({from.data(), to.data(), kFloat32, count, 0.3f});
      scale({from.data(), half.data(), kBFloat16, count, 0.3f});
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

}  // namespace

int main() {
  every_level_agrees_with_double_precision();
  scaled_numbers_are_rounded_once();
  return cvmk::testing::check_result();
}
