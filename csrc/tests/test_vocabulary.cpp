// Products with an output layer to the best ids and the sums, beside float64, at every level: exceptions of every kind, any split among threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "common/scratch.h"
#include "tests/check.h"
#include "tests/random.h"
#include "vocabulary/params.h"

namespace {

using namespace cvmk;
using namespace cvmk::vocabulary;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using cvmk::testing::Random;

// Logits [rows, n] as sums of a layer, handed on as the products of a kernel would be.
struct Logits {
  std::int64_t rows, n;
  std::vector<float> values, bias;
  gemm::Linear linear{};

  void hand_on(const gemm::Sink& sink, std::int64_t first, std::int64_t end) {
    linear.bias = bias.empty() ? nullptr : bias.data() + first;
    linear.bias_dtype = kFloat32;
    for (std::int64_t column = first; column < end; column += gemm::kPartColumns)
      for (std::int64_t row = 0; row < rows; row += 7)
        sink.take(sink.context, {&linear, row, std::min<std::int64_t>(7, rows - row), column - first, std::min<std::int64_t>(gemm::kPartColumns, end - column),
                                 values.data() + row * stride() + column, stride(), nullptr});
  }
  std::int64_t stride() const { return up(n, gemm::kPartColumns); }
};

struct Found {
  std::vector<std::vector<std::pair<float, std::int32_t>>> best;
  std::vector<double> normalisers;
  std::vector<float> wanted;
};

Found found_by(Logits& logits, const std::vector<Row>& rows, std::int64_t threads, std::int64_t never) {
  const std::int64_t segments = pieces(logits.n, kSegment), count = logits.rows;
  const Kernels& known = kernels();
  std::vector<Part> parts;
  std::vector<std::vector<Best>> best(static_cast<std::size_t>(threads));
  std::vector<std::vector<float>> values;
  std::vector<std::vector<std::int32_t>> ids;
  std::vector<std::vector<Lanes>> lanes(static_cast<std::size_t>(threads), std::vector<Lanes>(static_cast<std::size_t>(count)));
  std::vector<float> shifts(static_cast<std::size_t>(count * segments), __builtin_nanf("")), sums(shifts), wanted(static_cast<std::size_t>(count), -kInfinity);
  for (std::int64_t t = 0; t < threads; ++t) {
    for (const Row& row : rows) {
      values.emplace_back(static_cast<std::size_t>(row.k));
      ids.emplace_back(static_cast<std::size_t>(row.k));
      best[static_cast<std::size_t>(t)].push_back({0, values.back().data(), ids.back().data()});
    }
    const std::int64_t first = segments * t / threads * kSegment, end = std::min(logits.n, segments * (t + 1) / threads * kSegment);
    parts.push_back({rows.data(), best[static_cast<std::size_t>(t)].data(), lanes[static_cast<std::size_t>(t)].data(), shifts.data(), sums.data(), wanted.data(), first, end - first, segments, never});
  }
  for (Part& part : parts)
    if (part.n > 0) logits.hand_on({known.take, &part}, part.first, part.first + part.n);
  Found found;
  found.wanted = wanted;
  for (std::int64_t r = 0; r < count; ++r) {
    known.merge(rows[static_cast<std::size_t>(r)], parts.data(), threads, r);
    const Best& all = best[0][static_cast<std::size_t>(r)];
    auto& own = found.best.emplace_back();
    for (std::int64_t i = 0; i < all.count; ++i) own.emplace_back(all.values[i], all.ids[i]);
    if (rows[static_cast<std::size_t>(r)].k > kSorted) std::sort(own.begin(), own.end(), [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
    found.normalisers.push_back(rows[static_cast<std::size_t>(r)].sum ? known.normaliser(shifts.data() + r * segments, sums.data() + r * segments, segments) : 0.0);
  }
  return found;
}

void best_and_sums_are_right(std::int64_t n, std::int64_t k, float spread, float middle, bool bias, std::int64_t never) {
  Random random;
  Logits logits{9, n, {}, {}};
  logits.values.assign(static_cast<std::size_t>(logits.rows * logits.stride()), __builtin_nanf(""));
  for (std::int64_t r = 0; r < logits.rows; ++r)
    for (std::int64_t i = 0; i < n; ++i) logits.values[static_cast<std::size_t>(r * logits.stride() + i)] = middle + spread * std::round(16.0f * random.real()) / 8.0f;  // ties
  if (bias)
    for (std::int64_t i = 0; i < n; ++i) logits.bias.push_back(2.0f * random.real());
  std::vector<std::vector<std::int32_t>> said(9), forbidden(9);
  std::vector<std::vector<float>> whole(9);
  std::vector<Row> rows;
  for (std::size_t r = 0; r < 9; ++r) {
    for (auto* ids : {&said[r], &forbidden[r]})
      if (r % 3 == (ids == &said[r] ? 1u : 2u)) {
        for (int i = 0; i < 6; ++i) ids->push_back(static_cast<std::int32_t>(random.below(n)));
        std::sort(ids->begin(), ids->end());
        ids->erase(std::unique(ids->begin(), ids->end()), ids->end());
      }
    if (r == 4) whole[r].assign(static_cast<std::size_t>(n), __builtin_nanf(""));
    const std::int32_t wanted = r == 5 ? static_cast<std::int32_t>(n - 1) : -1;
    rows.push_back({r == 7 ? 0 : k, r != 8, wanted, whole[r].empty() ? nullptr : whole[r].data(), said[r].data(), static_cast<std::int64_t>(said[r].size()), 1.5f,
                    forbidden[r].data(), static_cast<std::int64_t>(forbidden[r].size()), wanted < 0 && whole[r].empty() && said[r].empty() && forbidden[r].empty()});
  }
  const Found found = found_by(logits, rows, 1, never);
  for (const std::int64_t threads : {2, 3}) {
    const Found other = found_by(logits, rows, threads, never);
    CHECK(other.best == found.best && other.normalisers == found.normalisers && other.wanted == found.wanted);
  }
  for (std::size_t r = 0; r < 9; ++r) {
    std::vector<float> row(logits.values.begin() + static_cast<std::ptrdiff_t>(r) * logits.stride(), logits.values.begin() + static_cast<std::ptrdiff_t>(r) * logits.stride() + n);
    for (std::int64_t i = 0; bias && i < n; ++i) row[static_cast<std::size_t>(i)] += logits.bias[static_cast<std::size_t>(i)];
    for (std::int64_t i = 0; i < std::min(never, n); ++i) row[static_cast<std::size_t>(i)] = -kInfinity;
    for (const std::int32_t id : said[r]) {
      float& logit = row[static_cast<std::size_t>(id)];
      logit = logit > 0.0f ? logit / 1.5f : logit * 1.5f;
    }
    double highest = -1e300, sum = 0.0;
    for (const float x : row) highest = std::max(highest, static_cast<double>(x));
    for (const float x : row) sum += std::exp(static_cast<double>(x) - highest);
    if (rows[r].sum && highest > -1e300) CHECK(std::fabs(found.normalisers[r] - highest - std::log(sum)) <= 4e-7 * (1.0 + std::fabs(highest)));
    if (rows[r].wanted >= 0) CHECK(found.wanted[r] == row[static_cast<std::size_t>(n - 1)]);
    if (rows[r].logits != nullptr) CHECK(whole[r] == row);
    std::vector<std::pair<float, std::int32_t>> expected;
    for (std::int64_t i = 0; i < n; ++i)
      if (row[static_cast<std::size_t>(i)] > -kInfinity && !std::binary_search(forbidden[r].begin(), forbidden[r].end(), static_cast<std::int32_t>(i))) expected.emplace_back(row[static_cast<std::size_t>(i)], static_cast<std::int32_t>(i));
    std::stable_sort(expected.begin(), expected.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    if (expected.size() > static_cast<std::size_t>(rows[r].k)) expected.resize(static_cast<std::size_t>(rows[r].k));
    CHECK(found.best[r] == expected);
  }
}

// What is not finite is never among the best, and makes the sum NaN.
void no_numbers() {
  Logits logits{2, 700, std::vector<float>(2 * 704, 1.0f), {}};
  logits.values[600] = __builtin_nanf("");
  logits.values[704 + 3] = kInfinity;
  std::vector<Row> rows(2, {2, true, -1, nullptr, nullptr, 0, 1.0f, nullptr, 0, true});
  const Found found = found_by(logits, rows, 2, 0);
  CHECK(std::isnan(found.normalisers[0]) && !std::isfinite(found.normalisers[1]));
  CHECK(found.best[0].size() == 2 && found.best[0][0].first == 1.0f);
}

}  // namespace

int main() {
  cvmk::testing::at_every_level([] {
    for (const std::int64_t n : {1, 5, 64, 65, 512, 513, 3000})
      for (const std::int64_t k : {1, 2, 10, 64, 65, 300})
        for (const float spread : {0.0f, 3.0f, 200.0f})
          for (const float middle : {0.0f, -1000.0f, 1000.0f}) best_and_sums_are_right(n, k, spread, middle, (n + k) % 2 == 0, n % 3);
    no_numbers();
  });
  return cvmk::testing::check_result();
}
