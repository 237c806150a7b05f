// The norm's kernels at every level against loops in double precision, with memory of exactly the size that they may touch.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/dropout.h"
#include "common/scratch.h"
#include "norm/params.h"
#include "tests/check.h"
#include "tests/random.h"

namespace {

using namespace cvmk::norm;
using cvmk::Elements;
using cvmk::testing::Floats;
using cvmk::testing::generator;
using cvmk::testing::near;
using cvmk::testing::normal;
using cvmk::testing::poisoned;

constexpr double kNear = 2e-5;

void check_case(std::int64_t rows, std::int64_t n, bool rms, bool with_branch, std::uint32_t limit) {
  const std::int64_t count = rows * n;
  Floats x = normal(count), branch = normal(count), weight = normal(n), bias = normal(n), grad_sum = normal(count), grad_normed = normal(count);
  Floats sum = poisoned(count), normed = sum, dx = sum, dbranch = sum, stats = poisoned(2 * rows), dweight = poisoned(n), dbias = dweight;
  const auto elements = [](Floats& values) { return Elements{values.data(), cvmk::kFloat32}; };
  const Shape shape{rows, n, elements(weight), limit == 0 ? 1.0f : 2.0f, 99u, limit, rms};
  ResidualForward f{shape, elements(x), {}, elements(bias), {}, elements(normed), stats.data(), 1e-3f};
  ResidualBackward b{shape, elements(x), {}, elements(grad_normed), elements(dx), {}, elements(dweight), elements(dbias), stats.data()};
  if (with_branch) {
    f.branch = elements(branch), f.sum = elements(sum);
    b.sum = elements(sum), b.grad_sum = elements(grad_sum), b.dbranch = elements(dbranch);
  }
  cvmk::run(kernels().forward, f, cvmk::openmp_team());
  cvmk::run(kernels().backward, b, cvmk::openmp_team());

  const auto size = static_cast<std::size_t>(count), width = static_cast<std::size_t>(n);
  std::vector<double> s(size), y(size), want_dx(size), want_dbranch(size), want_dweight(width), want_dbias(width);
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto at = [&](std::int64_t j) { return static_cast<std::size_t>(r * n + j); };
    double mean = 0, variance = 0, g_mean = 0, gx_mean = 0;
    std::vector<double> keep(width, 1.0), xh(width);
    for (std::int64_t j = 0; j < n; ++j) {
      const auto column = static_cast<std::size_t>(j);
      if (limit != 0) keep[column] = cvmk::mix(cvmk::row_hash(99u, 0, r) ^ cvmk::mix(99u ^ cvmk::mix(static_cast<std::uint32_t>(j)))) >= limit ? 2.0 : 0.0;
      s[at(j)] = x[at(j)] + (with_branch ? keep[column] * branch[at(j)] : 0.0);
      if (!rms) mean += s[at(j)] / static_cast<double>(n);
    }
    for (std::int64_t j = 0; j < n; ++j) variance += (s[at(j)] - mean) * (s[at(j)] - mean) / static_cast<double>(n);
    const double factor = 1.0 / std::sqrt(variance + 1e-3f);
    for (std::int64_t j = 0; j < n; ++j) {
      const auto column = static_cast<std::size_t>(j);
      xh[column] = (s[at(j)] - mean) * factor;
      y[at(j)] = xh[column] * weight[column] + bias[column];
      const double g = static_cast<double>(grad_normed[at(j)]) * weight[column];
      if (!rms) g_mean += g / static_cast<double>(n);
      gx_mean += g * xh[column] / static_cast<double>(n);
      want_dweight[column] += grad_normed[at(j)] * xh[column];
      want_dbias[column] += grad_normed[at(j)];
    }
    for (std::int64_t j = 0; j < n; ++j) {
      const auto column = static_cast<std::size_t>(j);
      want_dx[at(j)] = factor * (static_cast<double>(grad_normed[at(j)]) * weight[column] - g_mean - xh[column] * gx_mean) + (with_branch ? grad_sum[at(j)] : 0.0f);
      want_dbranch[at(j)] = keep[column] * want_dx[at(j)];
    }
  }
  CHECK(near(normed, y, kNear) && near(dx, want_dx, kNear) && near(dweight, want_dweight, kNear) && near(dbias, want_dbias, kNear));
  if (with_branch) CHECK(near(sum, s, kNear) && near(dbranch, want_dbranch, kNear));

  if (limit != 0 || !with_branch) return;  // what the engine calls: in place
  Floats stream = x, out = poisoned(count);
  const Residual p{stream.data(), branch.data(), out.data(), weight.data(), bias.data(), rows, n, 1e-3f, rms};
  cvmk::run(kernels().residual, p, cvmk::openmp_team());
  CHECK(near(stream, s, kNear) && near(out, y, kNear));
}

}  // namespace

int main() {
  cvmk::testing::at_every_level([] {
    for (const std::int64_t n : {1, 3, 16, 17, 128, 135})
      for (const std::int64_t rows : {0, 1, 5, 33, 300})
        for (const bool rms : {false, true}) {
          check_case(rows, n, rms, true, 0);
          check_case(rows, n, rms, true, 1u << 31);
          check_case(rows, n, rms, false, 0);
        }
  });
  return cvmk::testing::check_result();
}
