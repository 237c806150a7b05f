// Attention over caches beside float64, at every level and for each type: odd sizes, grouped heads, caches written and copied in parts, NaN behind what is there.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "cached/params.h"
#include "common/scratch.h"
#include "tests/check.h"
#include "tests/random.h"

namespace {

using namespace cvmk;
using namespace cvmk::cached;

using cvmk::testing::Random;

float rounded(float x, Dtype dtype) {
  if (dtype != kBFloat16) return x;
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Sizes {
  std::int64_t heads, kv_heads, d;
};

// What a cache holds of keys or values, heads of d numbers side by side.
std::vector<float> held(std::vector<float> x, std::int64_t d, Dtype dtype) {
  for (float& one : x) one = rounded(one, dtype);
  for (std::size_t head = 0; dtype == kInt8 && head < x.size(); head += static_cast<std::size_t>(d)) {
    float largest = 0.0f;
    for (std::size_t i = head; i < head + static_cast<std::size_t>(d); ++i) largest = std::max(largest, std::fabs(x[i]));
    const float a = std::max(largest, std::ldexp(1.0f, -100));
    for (std::size_t i = head; i < head + static_cast<std::size_t>(d); ++i) x[i] = std::nearbyint(x[i] * (127.0f / a)) * (a / 127.0f);
  }
  return x;
}

// A cache in memory of its own, which is NaN before anything is written.
struct Owned {
  std::vector<std::uint32_t> memory;
  Cache cache;

  Owned(const Sizes& s, std::int64_t capacity, Dtype dtype) {
    memory.assign(static_cast<std::size_t>(cache_bytes(s.kv_heads, s.d, capacity, dtype) / 4), 0x7FC07FC0u);
    cache = cache_in(memory.data(), s.kv_heads, s.d, capacity, dtype);
  }
};

struct Rows {
  std::int64_t width;
  std::vector<float> keys, values;

  Rows(Random& random, const Sizes& s, std::int64_t length) : width(s.kv_heads * s.d), keys(static_cast<std::size_t>(length * width)), values(keys.size()) {
    for (float& x : keys) x = 4.0f * random.real();
    for (float& x : values) x = 2.0f * random.real();
  }
  void append(const Sizes& s, const Cache& cache, std::int64_t first, std::int64_t rows, Dtype dtype) const {
    Append p{keys.data() + first * width, values.data() + first * width, width, rows, first, s.kv_heads, s.d, cache, dtype};
    kernels_for(p).append.run(p, nullptr, Team{});
  }
};

std::vector<float> attended(const Sizes& s, const Cache& cache, std::int64_t length, const std::vector<float>& q, std::int64_t rows, float* map, Dtype dtype) {
  std::vector<float> out(q.size(), std::numeric_limits<float>::quiet_NaN());
  const Item item{q.data(), out.data(), rows, s.heads * s.d, s.heads * s.d, cache, length, map};
  Attention p{&item, 1, s.heads, s.kv_heads, s.d, length, 0.3f, dtype};
  const Kernels& found = kernels_for(p);
  cvmk::run(found.attention, p, Team{});
  return out;
}

void attention_is_close(const Sizes& s, std::int64_t length, std::int64_t rows, Dtype dtype) {
  Random random;
  const Rows kv(random, s, length);
  Owned whole(s, up(length, kColumns) + kColumns, dtype), parts(s, up(length, kColumns), dtype);
  kv.append(s, whole.cache, 0, length, dtype);
  // Position by position, from a copy of the first half that another sequence had written on.
  const std::int64_t half = length / 2;
  const Rows other(random, s, length);
  other.append(s, parts.cache, 0, length, dtype);
  const Copy copy{whole.cache, parts.cache, 0, half, s.kv_heads, s.d, dtype};
  kernels().copy.run(copy, nullptr, Team{});
  for (std::int64_t i = half; i < length; ++i) kv.append(s, parts.cache, i, 1, dtype);
  std::vector<float> q(static_cast<std::size_t>(rows * s.heads * s.d)), map(static_cast<std::size_t>(rows * length), std::numeric_limits<float>::quiet_NaN()), map_of_parts(map);
  for (float& x : q) x = 4.0f * random.real();
  const std::vector<float> out = attended(s, whole.cache, length, q, rows, map.data(), dtype);
  const std::vector<float> same = attended(s, parts.cache, length, q, rows, map_of_parts.data(), dtype);
  CHECK(std::memcmp(out.data(), same.data(), out.size() * 4) == 0 && std::memcmp(map.data(), map_of_parts.data(), map.size() * 4) == 0);
  // A row alone has the bits that it has beside others (float32's few and many rows differ by roundings only where sums are long).
  if (dtype != kFloat32)
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto begin = q.begin() + r * s.heads * s.d;
      const std::vector<float> alone = attended(s, whole.cache, length, {begin, begin + s.heads * s.d}, 1, nullptr, dtype);
      CHECK(std::memcmp(alone.data(), out.data() + r * s.heads * s.d, alone.size() * 4) == 0);
    }
  const std::vector<float> keys = held(kv.keys, s.d, dtype), values = held(kv.values, s.d, dtype);
  // bfloat16: weights rounded to 2^-9, values below 1; int8: queries and weights to 2^-15 of their largest.
  const double tolerance = dtype == kBFloat16 ? 8e-3 : dtype == kInt8 ? 4e-4 : 2e-6, map_tolerance = dtype == kInt8 ? 2e-5 : 2e-6;
  double worst = 0.0, worst_map = 0.0;
  for (std::int64_t r = 0; r < rows; ++r) {
    std::vector<double> mean(static_cast<std::size_t>(length), 0.0);
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const std::int64_t kvh = h / (s.heads / s.kv_heads);
      std::vector<double> weights;
      double highest = -1e300, sum = 0.0;
      for (std::int64_t j = 0; j < length; ++j) {
        double score = 0.0;
        for (std::int64_t i = 0; i < s.d; ++i)
          score += static_cast<double>(rounded(q[static_cast<std::size_t>((r * s.heads + h) * s.d + i)], dtype)) *
                   static_cast<double>(keys[static_cast<std::size_t>(j * kv.width + kvh * s.d + i)]);
        weights.push_back(score * static_cast<double>(0.3f));
        highest = std::max(highest, weights.back());
      }
      for (double& w : weights) sum += w = std::exp(w - highest);
      for (std::int64_t j = 0; j < length; ++j) mean[static_cast<std::size_t>(j)] += weights[static_cast<std::size_t>(j)] / sum / static_cast<double>(s.heads);
      for (std::int64_t i = 0; i < s.d; ++i) {
        double expected = 0.0;
        for (std::int64_t j = 0; j < length; ++j)
          expected += weights[static_cast<std::size_t>(j)] / sum * static_cast<double>(values[static_cast<std::size_t>(j * kv.width + kvh * s.d + i)]);
        worst = std::max(worst, std::fabs(expected - static_cast<double>(out[static_cast<std::size_t>((r * s.heads + h) * s.d + i)])));
      }
    }
    for (std::int64_t j = 0; j < length; ++j) worst_map = std::max(worst_map, std::fabs(mean[static_cast<std::size_t>(j)] - static_cast<double>(map[static_cast<std::size_t>(r * length + j)])));
  }
  CHECK(worst <= tolerance);
  CHECK(worst_map <= map_tolerance);
}

// Of later positions, a copy that begins in the middle of a block and of a pair.
void copies_leave_what_is_before(Dtype dtype) {
  const Sizes s{2, 1, 6};
  Random random;
  const Rows a(random, s, 40), b(random, s, 40);
  Owned from(s, 48, dtype), to(s, 64, dtype);
  a.append(s, from.cache, 0, 40, dtype);
  b.append(s, to.cache, 0, 37, dtype);
  // The first 21 positions are the same in both, as those of hypotheses that part there.
  a.append(s, to.cache, 0, 21, dtype);
  kernels().copy.run({from.cache, to.cache, 21, 39, s.kv_heads, s.d, dtype}, nullptr, Team{});
  std::vector<float> q(12);
  for (float& x : q) x = 2.0f * random.real();
  for (const std::int64_t length : {21, 22, 38, 39})
    CHECK(attended(s, from.cache, length, q, 1, nullptr, dtype) == attended(s, to.cache, length, q, 1, nullptr, dtype));
}

void nothing_to_attend_to() {
  const Sizes s{2, 2, 8};
  const Owned empty(s, 16, kBFloat16);
  for (const Dtype dtype : {kFloat32, kBFloat16, kInt8})
    for (const float x : attended(s, empty.cache, 0, std::vector<float>(48, 1.0f), 3, nullptr, dtype)) CHECK(x == 0.0f);
}

// Bytes cannot say NaN or infinity: the scale does, for the key or value that is not finite and no other.
void what_is_not_finite() {
  const Sizes s{1, 1, 5};
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Random random;
    Rows kv(random, s, 3);
    kv.keys[7] = bad;
    for (std::size_t i = 10; i < 15; ++i) kv.values[i] = 0.0f;
    Owned owned(s, 16, kInt8);
    kv.append(s, owned.cache, 0, 3, kInt8);
    CHECK(!std::isnan(owned.cache.scales[0]) && std::isnan(owned.cache.scales[1]) && !std::isnan(owned.cache.scales[2]));
    for (int i = 16; i < 19; ++i) CHECK(std::isfinite(owned.cache.scales[i]));
    for (const float x : attended(s, owned.cache, 1, std::vector<float>(5, 1.0f), 1, nullptr, kInt8)) CHECK(std::isfinite(x));
    for (const float x : attended(s, owned.cache, 2, std::vector<float>(5, 1.0f), 1, nullptr, kInt8)) CHECK(std::isnan(x));
  }
}

// Items of one call, some without rows or without keys, give what each gives alone: what is asked for in advance of the next one changes nothing.
void items_stand_alone(const Sizes& s, Dtype dtype) {
  Random random;
  std::vector<std::unique_ptr<Owned>> caches;
  std::vector<std::vector<float>> q, out;
  std::vector<Item> items;
  const std::int64_t width = s.heads * s.d;
  for (const auto& [rows, length] : std::vector<std::pair<std::int64_t, std::int64_t>>{{2, 5}, {0, 0}, {1, 40}, {0, 7}, {3, 0}, {1, 16}}) {
    caches.push_back(std::make_unique<Owned>(s, up(length + 1, kColumns), dtype));
    if (length > 0) Rows(random, s, length).append(s, caches.back()->cache, 0, length, dtype);
    q.emplace_back(static_cast<std::size_t>(rows * width));
    for (float& x : q.back()) x = random.real();
    out.emplace_back(q.back().size(), std::numeric_limits<float>::quiet_NaN());
    items.push_back({q.back().data(), out.back().data(), rows, width, width, caches.back()->cache, length, nullptr});
  }
  Attention p{items.data(), static_cast<std::int64_t>(items.size()), s.heads, s.kv_heads, s.d, 40, 0.3f, dtype};
  const Kernels& found = kernels_for(p);
  cvmk::run(found.attention, p, Team{});
  for (std::size_t i = 0; i < items.size(); ++i) {
    const std::vector<float> alone = attended(s, items[i].cache, items[i].length, q[i], items[i].rows, nullptr, dtype);
    CHECK(alone.empty() || std::memcmp(alone.data(), out[i].data(), alone.size() * 4) == 0);
  }
}

}  // namespace

int main() {
  cvmk::testing::at_every_level([] {
    for (const Dtype dtype : {kFloat32, kBFloat16, kInt8}) {
      for (const Sizes& s : {Sizes{1, 1, 1}, Sizes{4, 4, 32}, Sizes{3, 1, 7}, Sizes{6, 2, 33}, Sizes{8, 8, 64}, Sizes{5, 5, 16}})
        for (const std::int64_t length : {1, 2, 15, 16, 17, 33, 130})
          for (const std::int64_t rows : {1, 2, 5, 26}) attention_is_close(s, length, rows, dtype);
      copies_leave_what_is_before(dtype);
      for (const Sizes& s : {Sizes{1, 1, 1}, Sizes{4, 4, 32}, Sizes{3, 1, 7}}) items_stand_alone(s, dtype);
    }
    nothing_to_attend_to();
    what_is_not_finite();
  });
  return cvmk::testing::check_result();
}
