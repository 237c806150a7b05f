#include "engine/engine.h"

#include <new>

namespace cvmk::engine {
namespace {

// Rows of one shard get all threads for what is large in a step (gemm/int8.inl, float_linear.inl): two read the weights faster than one, even for one row.

}  // namespace

Engine::Engine(const Config& config, const RawTensors& tensors, Compute compute, int threads, Budget budget, const std::set<std::string>& tokens)
    : model_(config, tensors, compute, tokens), budget_(budget), pool_(threads), submitted_(model_, memory_, threads, budget) {}

void Engine::submit(std::int64_t id, Request request, bool partial, double timeout) {
  submitted_.submit(id, std::move(request), partial, timeout > 0.0 ? Scheduler::now() + timeout : 0.0);
}

void Engine::run(Scheduler& scheduler, bool to_the_end, const std::function<bool()>& interrupted) {
  // The pool serves one call at a time; another caller works alone meanwhile.
  const std::unique_lock<std::mutex> lock(pool_mutex_, std::try_to_lock);
  const int shards = scheduler.wanted_shards();
  const std::thread::id caller = std::this_thread::get_id();
  bool stopped = false;  // the caller's
  const auto steps = [&](int shard, const Team& team) {
    while (scheduler.step(shard, team) && to_the_end)
      if (interrupted && std::this_thread::get_id() == caller && !stopped && interrupted()) {
        stopped = true;
        scheduler.abandon();
      }
  };
  if (!lock.owns_lock() || shards <= 1) {
    const bool helped = lock.owns_lock() && pool_.size() > 1;
    for (int shard = 0; shard < shards; ++shard) steps(shard, helped ? pool_.team() : Team{});
  } else {
    pool_.run(shards, [&](int shard, int) { steps(shard, Team{}); });
  }
  if (stopped) throw Interrupted();
}

std::vector<Event> Engine::step() {
  const std::unique_lock<std::mutex> lock(step_mutex_, std::try_to_lock);
  if (!lock.owns_lock()) throw std::runtime_error("another thread is in step(): let one thread at a time step an engine");
  run(submitted_, false);
  return submitted_.take_events();
}

std::vector<std::vector<Hypothesis>> Engine::search(std::vector<Request> requests, const std::function<bool()>& interrupted) {
  std::unique_ptr<Scheduler> own;
  {
    const std::lock_guard<std::mutex> lock(idle_mutex_);
    if (!idle_.empty()) {
      own = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (own == nullptr) own = std::make_unique<Scheduler>(model_, memory_, pool_.size(), budget_);
  Scheduler& scheduler = *own;
  std::vector<std::vector<Hypothesis>> found(requests.size());
  for (std::size_t i = 0; i < requests.size(); ++i) scheduler.submit(static_cast<std::int64_t>(i), std::move(requests[i]), false, 0.0);
  std::size_t ended = 0;
  while (ended < found.size()) {
    run(scheduler, true, interrupted);
    for (Event& event : scheduler.take_events()) {
      if (event.kind == Event::kFailed) throw std::bad_alloc();
      found[static_cast<std::size_t>(event.id)] = std::move(event.hypotheses);
      ++ended;
    }
  }
  const std::lock_guard<std::mutex> lock(idle_mutex_);
  idle_.push_back(std::move(own));
  return found;
}

}  // namespace cvmk::engine
