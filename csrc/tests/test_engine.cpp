// The engine on models of random weights: the same bits alone, in company and with any number of threads, at every level; requests that come, go and fail.
#include "engine/engine.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/check.h"
#include "tests/random_models.h"

namespace {

using namespace cvmk;
using namespace cvmk::engine;
using testing::Random;
using testing::Weights;
using testing::config_of;
using testing::recurrent_config_of;

std::vector<Request> requests_of(const Config& c, int count) {
  Random random;
  std::vector<Request> found;
  for (int i = 0; i < count; ++i) {
    Request r;
    for (int n = random.below(20); n > 0; --n) r.source.push_back(4 + random.below(static_cast<int>(c.vocabulary) - 4));
    for (int n = i % 3 == 0 ? random.below(4) : 0; n > 0; --n) r.prefix.push_back(4 + random.below(static_cast<int>(c.vocabulary) - 4));
    r.limit = 4 + random.below(20);
    Options& o = r.options;
    o.beam_size = i % 4 == 1 ? 3 : i % 4 == 3 ? 5 : 1;
    o.n_best = o.beam_size;
    if (i % 5 == 2) o.no_repeat_ngram = 2;
    if (i % 5 == 3) o.repetition_penalty = 1.4f;
    if (i % 7 == 4) o.suppressed = {5, 9, 100};
    if (i % 6 == 5) {
      o.temperature = 1.0;
      o.top_k = i % 4 * 10;
      o.top_p = 0.9;
      o.seed = static_cast<std::uint64_t>(i);
    }
    if (i % 9 == 6) o.prefix_bias = 0.5;
    o.alignments = i % 8 == 7;
    o.scores = i % 3 != 0;
    found.push_back(std::move(r));
  }
  return found;
}

bool same(const std::vector<Hypothesis>& a, const std::vector<Hypothesis>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (a[i].pieces != b[i].pieces || std::memcmp(&a[i].score, &b[i].score, sizeof a[i].score) != 0 || a[i].scores != b[i].scores || a[i].alignment != b[i].alignment) return false;
  return true;
}

// What is found does not depend on company, threads, or the order in which requests come and go.
void company_changes_nothing(const Config& c, Compute compute) {
  const Weights weights(c);
  const std::vector<Request> requests = requests_of(c, 24);
  Engine alone(c, weights.tensors, compute, 1, Budget{});
  std::vector<std::vector<Hypothesis>> expected;
  for (const Request& r : requests) expected.push_back(alone.search({r})[0]);
  for (const int threads : {1, 2, 3}) {
    Engine engine(c, weights.tensors, compute, threads, Budget{200, 40});
    const std::vector<std::vector<Hypothesis>> found = engine.search(requests);
    for (std::size_t i = 0; i < requests.size(); ++i) CHECK(same(found[i], expected[i]));
    std::size_t submitted = 0, ended = 0;
    while (ended < requests.size()) {
      for (int n = 0; n < 2 && submitted < requests.size(); ++n, ++submitted) engine.submit(static_cast<std::int64_t>(submitted), requests[submitted], submitted % 2 == 0, 0.0);
      for (const Event& event : engine.step()) {
        if (event.kind == Event::kPartial) continue;
        CHECK(event.kind == Event::kFinished && same(event.hypotheses, expected[static_cast<std::size_t>(event.id)]));
        ++ended;
      }
    }
    CHECK(engine.step().empty());
  }
}

// A source that grows, shrinks and changes is translated as it is by an engine that has not seen it before, whatever of it was kept.
void sources_grow() {
  Config c = recurrent_config_of(true);
  c.max_length = 120;
  const Weights weights(c);
  Engine engine(c, weights.tensors, Compute::kFloat32, 2, Budget{}), fresh(c, weights.tensors, Compute::kFloat32, 1, Budget{});
  const std::shared_ptr<GrowingSource> source = engine.open_source(c.max_length);
  Random random;
  Request r;
  r.limit = 8;
  r.options.beam_size = 2;
  std::int64_t kept = 0;
  for (int i = 0; i < 40; ++i) {
    const std::size_t before = r.source.size();
    if (i % 3 == 2) r.source.resize(static_cast<std::size_t>(random.below(static_cast<int>(before) + 1)));
    if (i % 8 == 7) r.source.clear();
    for (int n = random.below(i % 5 == 0 ? 60 : 4); n > 0 && r.source.size() < 119; --n) r.source.push_back(4 + random.below(static_cast<int>(c.vocabulary) - 4));
    const std::vector<Hypothesis> expected = fresh.search({r})[0];
    Request growing = r;
    growing.growing = GrowingSource::lease(source);
    CHECK(same(engine.search({std::move(growing)})[0], expected));
    if (i % 3 != 2 && i % 8 != 7 && i > 0) CHECK(source->kept() == static_cast<std::int64_t>(before) + (r.source.size() == before ? 1 : 0));  // all but the end sign
    kept += source->kept();
  }
  CHECK(kept > 300);
}

// Alignments are distributions over the source; scores sum to the score.
void results_are_whole() {
  const Config c = config_of(false);
  const Weights weights(c);
  Engine engine(c, weights.tensors, Compute::kFloat32, 2, Budget{});
  std::vector<Request> requests = requests_of(c, 12);
  for (Request& r : requests) {
    r.options = Options{};
    r.options.beam_size = r.options.n_best = 2;
    r.options.alignments = true;
  }
  const auto found = engine.search(requests);
  for (std::size_t i = 0; i < found.size(); ++i)
    for (const Hypothesis& h : found[i]) {
      double sum = 0.0;
      for (const float score : h.scores) sum += static_cast<double>(score);
      CHECK(h.scores.size() == h.pieces.size() + 1);
      CHECK(std::fabs(sum / static_cast<double>(h.pieces.size() + 1) - h.score) < 1e-5);
      const std::size_t width = requests[i].source.size() + 1;
      CHECK(h.alignment.size() == h.pieces.size() * width);
      for (std::size_t row = 0; row < h.pieces.size(); ++row) {
        double mass = 0.0;
        for (std::size_t j = 0; j < width; ++j) mass += static_cast<double>(h.alignment[row * width + j]);
        CHECK(std::fabs(mass - 1.0) < 1e-5);
      }
    }
}

// Cancelled and late requests give their memory back, and others go on.
void requests_leave() {
  const Config c = config_of(true);
  const Weights weights(c);
  Engine engine(c, weights.tensors, Compute::kInt8, 2, Budget{});
  std::vector<Request> requests = requests_of(c, 12);
  for (Request& r : requests) r.options = Options{};
  const std::vector<std::vector<Hypothesis>> expected = engine.search(requests);
  for (std::size_t i = 0; i < requests.size(); ++i) engine.submit(100 + static_cast<std::int64_t>(i), requests[i], false, 0.0);
  while (!engine.step().empty() || engine.held_bytes() == 0) {
  }
  for (int idle = 0; idle < 100; ++idle) engine.step();
  const std::int64_t before = engine.held_bytes();
  for (std::size_t i = 0; i < requests.size(); ++i) engine.submit(static_cast<std::int64_t>(i), requests[i], false, i == 5 ? 1e-9 : 0.0);
  CHECK(engine.cancel(3));
  CHECK(!engine.cancel(3));
  CHECK(!engine.cancel(99));
  std::thread other([&] { CHECK(engine.cancel(4)); });
  other.join();
  std::size_t ended = 0;
  for (int steps = 0; ended < requests.size() - 2 && steps < 1000; ++steps)
    for (const Event& event : engine.step()) {
      CHECK(event.id != 3 && event.id != 4);
      if (event.id == 5) CHECK(event.kind == Event::kExpired);
      else CHECK(event.kind == Event::kFinished && same(event.hypotheses, expected[static_cast<std::size_t>(event.id)]));
      ++ended;
    }
  CHECK(ended == requests.size() - 2);
  CHECK(engine.held_bytes() == before);
}

// Threads that submit, cancel and search while one steps.
void many_threads() {
  const Config c = config_of(false);
  const Weights weights(c);
  Engine engine(c, weights.tensors, Compute::kFloat32, 2, Budget{});
  const std::vector<Request> requests = requests_of(c, 8);
  const auto expected = engine.search(requests);
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; ++i) {
        const std::int64_t id = t * 1000 + i;
        engine.submit(id, requests[static_cast<std::size_t>(i % 8)], true, 0.0);
        if (i % 3 == 0) engine.cancel(id);
      }
    });
  threads.emplace_back([&] {
    const auto found = engine.search(requests);
    for (std::size_t i = 0; i < found.size(); ++i) CHECK(same(found[i], expected[i]));
  });
  for (int quiet = 0; quiet < 200;) {
    const auto events = engine.step();
    for (const Event& event : events)
      if (event.kind == Event::kFinished) CHECK(same(event.hypotheses, expected[static_cast<std::size_t>(event.id % 1000 % 8)]));
    quiet = events.empty() ? quiet + 1 : 0;
  }
  for (std::thread& thread : threads) thread.join();
}

// What is kept is bounded by what was in use at once, whatever sizes come; a size that comes again is there.
void memory_is_bounded() {
  Memory memory(1 << 16);
  Random random;
  std::vector<std::pair<void*, std::int64_t>> held;
  std::int64_t used = 0, highest = 0;
  for (int i = 0; i < 20000; ++i) {
    if (held.size() < 12 && random.below(2) == 0) {
      const std::int64_t bytes = 1 + random.below(1 << (4 + random.below(16)));
      held.emplace_back(memory.take(bytes), bytes);
      static_cast<char*>(held.back().first)[bytes - 1] = 1;
      used += Memory::rounded(bytes);
      highest = std::max(highest, used);
    } else if (!held.empty()) {
      std::swap(held[static_cast<std::size_t>(random.below(static_cast<int>(held.size())))], held.back());
      memory.give(held.back().first, held.back().second);
      used -= Memory::rounded(held.back().second);
      held.pop_back();
    }
    CHECK(memory.used() == used && memory.kept() <= std::max<std::int64_t>(highest, 1 << 16));
  }
  for (const auto& [data, bytes] : held) memory.give(data, bytes);
  CHECK(memory.used() == 0);
  Memory other(1 << 16);
  void* first = other.take(5000);
  other.give(first, 5000);
  void* again = other.take(5000);
  CHECK(again == first);
  other.give(again, 5000);
}

void bad_models_are_named() {
  const Config c = config_of(false);
  const auto fails = [&](const char* text, const RawTensors& tensors) {
    try {
      Engine engine(c, tensors, Compute::kInt8, 1, Budget{});
      return false;
    } catch (const BadModel& error) {
      return std::string(error.what()).find(text) != std::string::npos;
    }
  };
  Weights weights(c);
  RawTensors tensors = weights.tensors;
  tensors.erase("decoder.norm.weight");
  CHECK(fails("lacks the tensor decoder.norm.weight", tensors));
  tensors = weights.tensors;
  tensors["more"] = tensors["decoder.norm.weight"];
  CHECK(fails("unknown tensor more", tensors));
  tensors = weights.tensors;
  tensors["decoder.norm.weight"].shape = {31};
  CHECK(fails("of shape [31]", tensors));
  weights.memory[0]->at(5) = __builtin_nanf("");
  CHECK(fails("no finite numbers", weights.tensors));
}

}  // namespace

int main() {
  cvmk::testing::at_every_level([] {
    for (const bool other : {false, true})
      for (const Compute compute : {Compute::kFloat32, Compute::kBFloat16, Compute::kInt8, Compute::kInt4}) {
        company_changes_nothing(config_of(other), compute);
        company_changes_nothing(recurrent_config_of(other), compute);
      }
    sources_grow();
  });
  results_are_whole();
  requests_leave();
  many_threads();
  memory_is_bounded();
  bad_models_are_named();
  return cvmk::testing::check_result();
}
