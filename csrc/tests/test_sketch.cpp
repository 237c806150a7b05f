// The sketch against the steps of Algorithm D and the definition of bottom-k, both on std::map and std::set.
#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sketch/sketch.h"
#include "tests/check.h"

namespace {

using namespace cvmk::sketch;
using Ids = std::vector<std::uint64_t>;

// A stream with many repeats of some ids and few of others; a linear congruential generator, so that it shares nothing with the sketch.
Ids stream(std::size_t length, std::uint64_t types, std::uint64_t seed) {
  Ids ids;
  std::uint64_t x = seed;
  for (std::size_t i = 0; i < length; ++i) {
    x = x * 6364136223846793005ull + 1442695040888963407ull;
    const std::uint64_t a = (x >> 33) % types;
    x = x * 6364136223846793005ull + 1442695040888963407ull;
    ids.push_back(a * ((x >> 33) % types) / types);
  }
  return ids;
}

void random_mode_follows_algorithm_d(std::uint64_t capacity, std::uint64_t types) {
  const Keys keys(77);
  const Ids ids = stream(20000, types, capacity);
  std::map<std::uint64_t, std::uint64_t> buffer;          // id -> u
  std::set<std::pair<std::uint64_t, std::uint64_t>> order;  // (u, id)
  std::uint64_t limit = ~std::uint64_t{0};
  for (std::size_t n = 0; n < ids.size(); ++n) {
    const auto old = buffer.find(ids[n]);
    if (old != buffer.end()) {
      order.erase({old->second, old->first});
      buffer.erase(old);
    }
    const std::uint64_t u = draw_at(keys, n);
    if (u > limit) continue;
    if (buffer.size() == capacity) {
      const auto last = *order.rbegin();
      limit = std::max(u, last.first) - 1;
      if (u > last.first) continue;
      order.erase(last);
      buffer.erase(last.second);
    }
    buffer[ids[n]] = u;
    order.insert({u, ids[n]});
  }
  Sketch sketch(capacity, Priority::kRandom, 77);
  sketch.add(ids.data(), ids.size());
  const State state = sketch.state();
  CHECK(state.limit == limit && state.seen == ids.size() && sketch.size() == order.size());
  std::size_t i = 0;
  for (const auto& [u, id] : order) {
    CHECK(i < state.ids.size() && state.ids[i] == id && state.priorities[i] == u);
    ++i;
  }
}

void hash_mode_keeps_the_smallest(std::uint64_t capacity, std::uint64_t types) {
  const Keys keys(5);
  const Ids ids = stream(20000, types, capacity + 1);
  std::map<std::uint64_t, std::pair<std::uint64_t, std::uint64_t>> all;  // hash -> (id, count)
  for (const std::uint64_t id : ids) {
    auto& entry = all[hash_id(keys, id)];
    entry.first = id;
    ++entry.second;
  }
  Sketch whole(capacity, Priority::kHash, 5);
  whole.add(ids.data(), ids.size());
  Sketch left(capacity, Priority::kHash, 5);
  Sketch right(capacity + 9, Priority::kHash, 5);
  left.add(ids.data(), 7000);
  right.add(ids.data() + 7000, ids.size() - 7000);
  left.merge(right.state());
  for (const Sketch* sketch : {&whole, &left}) {
    const State state = sketch->state();
    CHECK(state.ids.size() == std::min<std::size_t>(capacity, all.size()));
    auto next = all.begin();
    for (std::size_t i = 0; i < state.ids.size(); ++i, ++next) {
      CHECK(state.ids[i] == next->second.first && state.counts[i] == next->second.second);
    }
    CHECK(state.limit == (next == all.end() ? ~std::uint64_t{0} : next->first - 1));
  }
}

void bytes_are_kept() {
  const std::string text = "abcabcabXYZ";
  const std::int64_t offsets[] = {0, 3, 6, 8, 8, 11};
  Sketch sketch(10, Priority::kHash, 1);
  sketch.add_packed(reinterpret_cast<const unsigned char*>(text.data()), offsets, 5);
  const State state = sketch.state();
  const std::set<std::string> items(state.items.begin(), state.items.end());
  CHECK((items == std::set<std::string>{"abc", "ab", "", "XYZ"}));
  for (std::size_t i = 0; i < state.items.size(); ++i) CHECK(state.counts[i] == (state.items[i] == "abc" ? 2u : 1u));
}

void load_partial_reads_little_endian() {
  const unsigned char bytes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::uint64_t expected = 0;
  for (std::size_t n = 1; n <= 8; ++n) {
    expected |= std::uint64_t{bytes[n - 1]} << (8 * (n - 1));
    CHECK(load_partial(bytes, n) == expected);
  }
}

void wrong_capacity_is_refused() {
  for (const std::uint64_t capacity : {std::uint64_t{0}, kMaxCapacity + 1}) {
    bool refused = false;
    try {
      Sketch sketch(capacity, Priority::kHash, 0);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}

}  // namespace

int main() {
  for (const std::uint64_t capacity : {1, 2, 15, 16, 17, 100, 1000}) {
    for (const std::uint64_t types : {1, 16, 17, 120, 5000}) {
      random_mode_follows_algorithm_d(capacity, types);
      hash_mode_keeps_the_smallest(capacity, types);
    }
  }
  bytes_are_kept();
  load_partial_reads_little_endian();
  wrong_capacity_is_refused();
  return cvmk::testing::check_result();
}
