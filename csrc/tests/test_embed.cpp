// The embedding's kernels at every level against loops in double precision, with memory of exactly the size that they may touch.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/dropout.h"
#include "common/scratch.h"
#include "embed/params.h"
#include "tests/check.h"
#include "tests/random.h"

namespace {

using namespace cvmk::embed;
using cvmk::Elements;
using cvmk::testing::Floats;
using cvmk::testing::generator;
using cvmk::testing::near;
using cvmk::testing::normal;
using cvmk::testing::poisoned;

// Every other id is 0; positions come again after three rows.
void check_case(std::int64_t rows, std::int64_t n, std::int64_t vocabulary, bool with_positions, std::uint32_t limit) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(rows));
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = i % 2 == 0 ? 0 : static_cast<std::int32_t>(generator() % static_cast<std::uint32_t>(vocabulary));
  Floats weight = normal(vocabulary * n), positions = normal(3 * n), grad = normal(rows * n), out = poisoned(rows * n), dweight = poisoned(vocabulary * n);
  const auto elements = [](Floats& values) { return Elements{values.data(), cvmk::kFloat32}; };
  const Lookup lookup{ids.data(), cvmk::kInt32, rows, n, vocabulary, 1.5f, limit == 0 ? 1.0f : 2.0f, 99u, limit};
  const Forward f{lookup, elements(weight), with_positions ? elements(positions) : Elements{}, elements(out), 3};
  const Backward b{lookup, elements(grad), elements(dweight)};
  cvmk::run(kernels().forward, f, cvmk::openmp_team());
  cvmk::run(kernels().backward, b, cvmk::openmp_team());

  std::vector<double> want(out.size()), want_dweight(dweight.size());
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t j = 0; j < n; ++j) {
      const auto at = static_cast<std::size_t>(r * n + j), from = static_cast<std::size_t>(ids[static_cast<std::size_t>(r)] * n + j);
      const std::uint32_t hash = cvmk::mix(cvmk::row_hash(99u, 0, r) ^ cvmk::mix(99u ^ cvmk::mix(static_cast<std::uint32_t>(j))));
      const double keep = limit == 0 ? 1.0 : hash >= limit ? 2.0 : 0.0;
      want[at] = keep * (1.5 * weight[from] + (with_positions ? positions[static_cast<std::size_t>(r % 3 * n + j)] : 0.0f));
      want_dweight[from] += keep * 1.5 * grad[at];
    }
  CHECK(near(out, want, 1e-6) && near(dweight, want_dweight, 2e-5));  // a gradient is a sum of up to 1,200 terms
}

}  // namespace

int main() {
  cvmk::testing::at_every_level([] {
    for (const std::int64_t n : {1, 16, 17, 130})
      for (const std::int64_t rows : {0, 1, 3, 150, 1200}) {
        check_case(rows, n, 5, true, 0);
        check_case(rows, n, 200, false, 1u << 31);
        check_case(rows, n, 1, true, 1u << 30);
      }
  });
  return cvmk::testing::check_result();
}
