// A model, its threads, and the requests that it works on.
#pragma once

#include <functional>
#include <mutex>
#include <set>
#include <stdexcept>

#include "engine/scheduler.h"

namespace cvmk::engine {

struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

class Engine {
 public:
  // threads: at least 1, the caller's among them.
  Engine(const Config& config, const RawTensors& tensors, Compute compute, int threads, Budget budget, const std::set<std::string>& tokens = {});

  const Model& model() const { return model_; }
  int threads() const { return pool_.size(); }
  // Of sequences and threads.
  std::int64_t held_bytes() { return memory_.used() + submitted_.workspace_bytes(); }

  // `timeout` in seconds, 0 for none.
  void submit(std::int64_t id, Request request, bool partial, double timeout);
  bool cancel(std::int64_t id) { return submitted_.cancel(id); }
  // Brings what was submitted one piece further. Throws std::runtime_error where another thread is in it.
  std::vector<Event> step();
  // A source that grows, of at most `longest` positions. It must not outlive the engine.
  std::shared_ptr<GrowingSource> open_source(std::int64_t longest) { return std::make_shared<GrowingSource>(model_, memory_, longest); }
  // The hypotheses of each request, whatever else was submitted. `interrupted` is asked between steps, in the calling thread. Throws std::bad_alloc, and
  // Interrupted where it says so.
  std::vector<std::vector<Hypothesis>> search(std::vector<Request> requests, const std::function<bool()>& interrupted = {});

 private:
  // One step of every shard that has work, or steps until there is none.
  void run(Scheduler& scheduler, bool to_the_end, const std::function<bool()>& interrupted = {});

  Model model_;
  const Budget budget_;
  Memory memory_;
  Pool pool_;
  std::mutex pool_mutex_, step_mutex_, idle_mutex_;
  std::vector<std::unique_ptr<Scheduler>> idle_;  // of searches: what their threads work in is used again
  Scheduler submitted_;
};

}  // namespace cvmk::engine
