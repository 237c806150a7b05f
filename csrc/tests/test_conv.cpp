// Causal convolutions at every level against loops in double precision, with memory of exactly the size that they may touch.
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/scratch.h"
#include "conv/params.h"
#include "tests/check.h"
#include "tests/random.h"

namespace {

using namespace cvmk::conv;
using cvmk::Elements;
using cvmk::testing::Floats;
using cvmk::testing::near;
using cvmk::testing::normal;
using cvmk::testing::poisoned;

constexpr double kNear = 2e-5;

// [batch][rows][columns] with rows and columns exchanged.
Floats turned(const Floats& values, std::int64_t batch, std::int64_t rows, std::int64_t columns) {
  Floats out(values.size());
  for (std::int64_t i = 0; i < batch; ++i)
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < columns; ++c)
        out[static_cast<std::size_t>((i * columns + c) * rows + r)] = values[static_cast<std::size_t>((i * rows + r) * columns + c)];
  return out;
}

// [batch][length][dim] with the real steps of each row in reverse order.
Floats flipped(const Floats& values, const std::vector<std::int64_t>& lengths, std::int64_t length, std::int64_t dim) {
  Floats out = values;
  for (std::size_t b = 0; b < lengths.size(); ++b)
    for (std::int64_t t = 0; t < lengths[b]; ++t)
      for (std::int64_t c = 0; c < dim; ++c) {
        const std::int64_t row = static_cast<std::int64_t>(b) * length;
        out[static_cast<std::size_t>((row + t) * dim + c)] = values[static_cast<std::size_t>((row + lengths[b] - 1 - t) * dim + c)];
      }
  return out;
}

// Channels last, forwards and backwards: the results of the passes with time last. `found`: x, grad_out, out, last, dx, dbefore,
// dweight and dbias.
void check_channels_last(Shape s, Backward b, const std::vector<std::int64_t>& lengths, const std::vector<const Floats*>& found) {
  const std::int64_t inputs = s.batch * s.dim * s.length;
  s.channels_last = true, s.x_batch = s.length * s.dim + 3, s.x_step = s.dim;
  for (const bool reverse : {false, true}) {
    s.reverse = reverse;
    const auto in_order = [&](const Floats& values) {
      const Floats last = turned(values, s.batch, s.dim, s.length);
      return reverse ? flipped(last, lengths, s.length, s.dim) : last;
    };
    Floats x = poisoned(inputs + 3 * s.batch), given = in_order(*found[0]), grad = in_order(*found[1]);
    for (std::int64_t row = 0; row < s.batch; ++row)
      for (std::int64_t i = 0; i < s.length * s.dim; ++i)
        x[static_cast<std::size_t>(row * s.x_batch + i)] = given[static_cast<std::size_t>(row * s.length * s.dim + i)];
    Floats out = poisoned(inputs), last = poisoned(static_cast<std::int64_t>(found[3]->size())), dx = out, dbefore = last;
    Floats dweight = poisoned(s.dim * s.width), dbias = poisoned(s.dim);
    const auto elements = [](Floats& values) { return Elements{values.data(), cvmk::kFloat32}; };
    cvmk::run(kernels().forward, Forward{s, elements(x), elements(out), elements(last)}, cvmk::openmp_team());
    b.shape = s, b.x = elements(x), b.grad_out = elements(grad), b.grad_batch = s.length * s.dim, b.grad_step = s.dim;
    b.dx = elements(dx), b.dweight = dweight.data(), b.dbias = dbias.data(), b.dbefore = dbefore.data();
    cvmk::run(kernels().backward, b, cvmk::openmp_team());
    const auto as = [](const Floats& values) { return std::vector<double>(values.begin(), values.end()); };
    CHECK(last == *found[3] && near(out, as(in_order(*found[2])), 1e-6));
    CHECK(near(dx, as(in_order(*found[4])), 1e-6) && near(dbefore, as(*found[5]), 1e-6) && near(dweight, as(*found[6]), 1e-5) && near(dbias, as(*found[7]), 1e-5));
  }
}

void check_case(std::int64_t batch, std::int64_t dim, std::int64_t length, std::int64_t width, bool with_optional, bool silu) {
  const std::int64_t front = width - 1, rows = batch * dim;
  Floats x = normal(rows * length), weight = normal(dim * width), bias = normal(dim), before = normal(rows * front);
  Floats grad = normal(rows * length), grad_last = normal(rows * front);
  Floats out = poisoned(rows * length), last = poisoned(rows * front), dx = out, dbefore = last, dweight = poisoned(dim * width), dbias = poisoned(dim);
  std::vector<std::int64_t> lengths(static_cast<std::size_t>(batch));
  for (std::int64_t b = 0; b < batch; ++b) lengths[static_cast<std::size_t>(b)] = with_optional ? (b * 7 + 3) % (length + 1) : length;
  const auto elements = [](Floats& values) { return Elements{values.data(), cvmk::kFloat32}; };
  const bool o = with_optional;
  const float *const given_bias = o ? bias.data() : nullptr, *const given_before = o ? before.data() : nullptr;
  const Shape shape{batch, dim, length, width, weight.data(), given_bias, given_before, o ? lengths.data() : nullptr, cvmk::kInt64, silu};
  cvmk::run(kernels().forward, Forward{shape, elements(x), elements(out), elements(last)}, cvmk::openmp_team());
  const Backward b{shape, elements(x), elements(grad), elements(grad_last), elements(dx), dweight.data(), dbias.data(), dbefore.data()};
  cvmk::run(kernels().backward, b, cvmk::openmp_team());

  std::vector<double> want(out.size()), want_last(last.size()), want_dx(dx.size()), want_dbefore(dbefore.size());
  std::vector<double> want_dweight(dweight.size()), want_dbias(dbias.size());
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t channel = row % dim, real = lengths[static_cast<std::size_t>(row / dim)];
    std::vector<double> p(static_cast<std::size_t>(front + length)), dp(p.size());
    for (std::int64_t k = 0; k < front; ++k) p[static_cast<std::size_t>(k)] = o ? before[static_cast<std::size_t>(row * front + k)] : 0.0f;
    for (std::int64_t t = 0; t < real; ++t) p[static_cast<std::size_t>(front + t)] = x[static_cast<std::size_t>(row * length + t)];
    for (std::int64_t k = 0; k < front; ++k) {
      want_last[static_cast<std::size_t>(row * front + k)] = p[static_cast<std::size_t>(real + k)];
      dp[static_cast<std::size_t>(real + k)] += grad_last[static_cast<std::size_t>(row * front + k)];
    }
    for (std::int64_t t = 0; t < real; ++t) {
      double pre = o ? bias[static_cast<std::size_t>(channel)] : 0.0f, d = grad[static_cast<std::size_t>(row * length + t)];
      for (std::int64_t k = 0; k < width; ++k)
        pre += static_cast<double>(weight[static_cast<std::size_t>(channel * width + k)]) * p[static_cast<std::size_t>(t + k)];
      const double gate = 1 / (1 + std::exp(-pre));
      want[static_cast<std::size_t>(row * length + t)] = silu ? pre * gate : pre;
      if (silu) d *= gate * (1 + pre * (1 - gate));
      want_dbias[static_cast<std::size_t>(channel)] += d;
      for (std::int64_t k = 0; k < width; ++k) {
        want_dweight[static_cast<std::size_t>(channel * width + k)] += d * p[static_cast<std::size_t>(t + k)];
        dp[static_cast<std::size_t>(t + k)] += d * weight[static_cast<std::size_t>(channel * width + k)];
      }
    }
    for (std::int64_t k = 0; k < front; ++k) want_dbefore[static_cast<std::size_t>(row * front + k)] = dp[static_cast<std::size_t>(k)];
    for (std::int64_t t = 0; t < real; ++t) want_dx[static_cast<std::size_t>(row * length + t)] = dp[static_cast<std::size_t>(front + t)];
  }
  CHECK(near(out, want, kNear) && near(last, want_last, kNear) && near(dx, want_dx, kNear) && near(dbefore, want_dbefore, kNear));
  CHECK(near(dweight, want_dweight, 1e-4) && near(dbias, want_dbias, 1e-4));
  check_channels_last(shape, b, lengths, {&x, &grad, &out, &last, &dx, &dbefore, &dweight, &dbias});

  if (length == 0) return;  // steps, from the same start, of rows that are all real
  Floats state = o ? before : Floats(before.size(), 0.0f), y = poisoned(rows), now = poisoned(rows);
  const Shape whole{batch, dim, length, width, weight.data(), given_bias, given_before, nullptr, cvmk::kInt64, silu};
  cvmk::run(kernels().forward, Forward{whole, elements(x), elements(out), elements(last)}, cvmk::openmp_team());
  for (std::int64_t t = 0; t < length; ++t) {
    for (std::int64_t row = 0; row < rows; ++row) now[static_cast<std::size_t>(row)] = x[static_cast<std::size_t>(row * length + t)];
    const Update step{batch, dim, width, weight.data(), given_bias, elements(state), elements(now), elements(y), silu};
    cvmk::run(kernels().update, step, cvmk::openmp_team());
    std::vector<double> expected(y.size());
    for (std::int64_t row = 0; row < rows; ++row) expected[static_cast<std::size_t>(row)] = out[static_cast<std::size_t>(row * length + t)];
    CHECK(near(y, expected, kNear));
  }
  CHECK(state == last);
}

}  // namespace

int main() {
  cvmk::testing::at_every_level([] {
    for (const std::int64_t length : {0, 1, 2, 16, 17, 100})
      for (const std::int64_t width : {1, 2, 3, 4, 8})
        for (const bool silu : {false, true}) {
          check_case(3, 5, length, width, true, silu);
          check_case(2, 17, length, width, false, silu);
        }
    check_case(40, 33, 60, 4, true, true);  // enough for several threads
    check_case(0, 3, 5, 4, true, true);
  });
  return cvmk::testing::check_result();
}
