// The system has no memory at some moment, once or for the rest of a step: every request ends, finished or failed, nothing is kept, and what comes later is right.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "tests/check.h"
#include "tests/random_models.h"

namespace {

std::atomic<long> before_failing{-1};  // allocations; below 0: none fails
std::atomic<bool> keeps_failing{false}, failed{false};

void* allocate(std::size_t bytes, std::size_t alignment) {
  if (before_failing.load() >= 0 && (before_failing.fetch_sub(1) == 0 || failed.load())) {
    failed = true;
    before_failing = keeps_failing ? 0 : -1;
    throw std::bad_alloc();
  }
  void* const data = std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes, 16); }
void* operator new(std::size_t bytes, std::align_val_t alignment) { return allocate(bytes, static_cast<std::size_t>(alignment)); }
// Those that return null: a sanitizer has its own, which would not match the delete below.
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept try { return allocate(bytes, 16); } catch (const std::bad_alloc&) {
  return nullptr;
}
void* operator new(std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept try { return allocate(bytes, static_cast<std::size_t>(alignment)); } catch (const std::bad_alloc&) {
  return nullptr;
}
void operator delete(void* data) noexcept { std::free(data); }
void operator delete(void* data, std::size_t) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { std::free(data); }

namespace {

using namespace cvmk;
using namespace cvmk::engine;
using testing::Random;
using testing::Weights;
using testing::config_of;

std::vector<Request> requests_of(const Config& c) {
  Random random;
  std::vector<Request> found;
  for (int i = 0; i < 4; ++i) {
    Request r;
    for (int n = 3 + random.below(9); n > 0; --n) r.source.push_back(4 + random.below(static_cast<int>(c.vocabulary) - 4));
    r.limit = 5;
    r.options.beam_size = i % 2 == 1 ? 3 : 1;
    found.push_back(r);
  }
  return found;
}

// Steps until all have ended; memory fails at allocation number `at` of them, and where `whole`, until the end of that step. False where it did not come to that.
bool fails_at(Engine& engine, const std::vector<Request>& requests, long at, bool whole, const std::vector<std::vector<Hypothesis>>& expected) {
  const std::shared_ptr<GrowingSource> source = engine.open_source(32);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    Request request = requests[i];
    if (i == 2) request.growing = GrowingSource::lease(source);
    engine.submit(static_cast<std::int64_t>(i), std::move(request), i % 2 == 0, 0.0);
  }
  std::vector<int> ends(requests.size());
  std::size_t ended = 0;
  failed = false;
  keeps_failing = whole;
  before_failing = at;
  for (int steps = 0; ended < requests.size() && steps < 200; ++steps) {
    std::vector<Event> events;
    try {
      events = engine.step();
    } catch (const std::bad_alloc&) {  // nothing could be told
    }
    if (failed) {
      before_failing = -1;
      keeps_failing = false;
    }
    for (const Event& event : events) {
      const auto i = static_cast<std::size_t>(event.id);
      if (event.kind == Event::kPartial) continue;
      CHECK(event.kind == Event::kFailed || event.kind == Event::kFinished);
      if (event.kind == Event::kFinished) CHECK(event.hypotheses.size() == expected[i].size() && event.hypotheses[0].pieces == expected[i][0].pieces);
      ++ends[i];
      ++ended;
    }
  }
  before_failing = -1;
  keeps_failing = false;
  for (const int count : ends) CHECK(count == 1);
  return failed;
}

void every_moment(bool whole) {
  const Config c = config_of(true);
  const Weights weights(c);
  const std::vector<Request> requests = requests_of(c);
  Engine engine(c, weights.tensors, Compute::kInt8, 1, Budget{});
  const auto expected = engine.search(requests);
  CHECK(!fails_at(engine, requests, 1L << 40, false, expected));
  const std::int64_t held = engine.held_bytes();
  long at = 0;
  for (long stride = 1; fails_at(engine, requests, at, whole, expected); at += stride)
    if (at > 200) stride = 7;
  CHECK(at > 200);
  const auto found = engine.search(requests);
  for (std::size_t i = 0; i < found.size(); ++i) CHECK(found[i][0].pieces == expected[i][0].pieces);
  CHECK(engine.held_bytes() == held);
}

}  // namespace

int main() {
  every_moment(false);
  every_moment(true);
  return testing::check_result();
}
