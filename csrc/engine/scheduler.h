// Requests wait, begin where there is room, run a step at a time, and leave when they end. Each shard of the running ones is a thread's own.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/decoding.h"
#include "engine/pool.h"

namespace cvmk::engine {

struct Event {
  enum Kind { kPartial, kFinished, kExpired, kFailed };
  std::int64_t id;
  Kind kind;
  std::vector<Hypothesis> hypotheses;  // kPartial: one, its pieces only
};

// How many source positions times hypotheses run at once, and how many source positions are encoded between two steps.
struct Budget {
  std::int64_t running = 4096, encoded = 512;
};

class Scheduler {
 public:
  Scheduler(const Model& model, Memory& memory, int shards, Budget budget);

  // From any thread. `deadline` in seconds of now(), 0 for none.
  void submit(std::int64_t id, Request request, bool partial, double deadline);
  // True where the request was there and had not ended; no event of it comes after.
  bool cancel(std::int64_t id);
  // How many shards have or could have work now.
  int wanted_shards();
  // Newcomers of a shard, and one step of what runs there. False where there was nothing to do. One thread may step a shard at a time.
  bool step(int shard, const Team& team);
  // Nothing goes on: what waits and what runs is cancelled.
  void abandon();
  // What happened since the last call, in order.
  std::vector<Event> take_events();
  // Memory of its threads.
  std::int64_t workspace_bytes() const;
  static double now();

 private:
  struct Entry {
    std::int64_t id, cost;
    Request request;
    bool partial;
    double deadline;
    std::atomic<bool> cancelled{false};
    std::unique_ptr<Sequence> sequence;
    std::list<Event> end;  // one, until it is told
  };
  typedef std::shared_ptr<Entry> EntryPointer;
  struct Shard {
    std::vector<EntryPointer> running;
    Workspace workspace;
    std::vector<StepRow> rows;
    std::vector<StepResult> results;
    std::vector<std::size_t> first;
  };

  void expire();
  void admit(Shard& shard);
  void begin(Shard& shard, const Team& team);
  void leave(Shard& shard);
  void show(Shard& shard);
  void tell_end(Entry& entry, Event::Kind kind, std::vector<Hypothesis> hypotheses);
  void tell_partial(const Entry& entry, Hypothesis partial);
  void drop(Entry& entry, Event::Kind kind);

  const Model& model_;
  Memory& memory_;
  const Budget budget_;
  std::vector<std::unique_ptr<Shard>> shards_;
  std::mutex mutex_;  // guards what follows
  std::deque<EntryPointer> waiting_;
  std::map<std::int64_t, EntryPointer> entries_;
  std::list<Event> events_;
  std::int64_t running_ = 0, cost_ = 0;  // hypotheses that run, and what counts against the budget
};

}  // namespace cvmk::engine
