// The engine's own threads. A step takes microseconds, so they wait in a loop for a while before they sleep, and nobody waits for a thread that has
// not begun: on a busy machine the caller does its part.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "common/team.h"

namespace cvmk::engine {

class Pool {
 public:
  // `threads` with the caller's. The others begin with the first call, so that they have the priority of whoever computes, not of whoever loads; where the
  // system has no more of them then, `size` says how many there are, and these do the work.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return threads_; }
  // body(context, part, parts) once for each of `parts`, in any of the threads, several in one where others are late. Returns when all are done.
  void run(int parts, Team::Body body, void* context);
  template <typename F>
  void run(int parts, const F& body) {
    run(parts, [](void* context, int part, int all) { (*static_cast<const F*>(context))(part, all); }, const_cast<F*>(&body));
  }
  // For kernels that work within one step; they must not wait for each other (Team::barrier). Threads stay awake between two calls only for a while.
  Team team();

 private:
  void work(int number);
  void parts_of(unsigned long long number);

  // The call in progress in one word, so that a late thread takes no part of another call: its number (32 bits), its parts and the next of them (16 each).
  alignas(64) std::atomic<unsigned long long> claims_{0};
  alignas(64) std::atomic<int> left_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<Team::Body> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<bool> stopping_{false};
  std::atomic<int> threads_;
  int process_ = 0;  // that has the threads
  // On the heap, for a copy by fork must leave it: who sleeps there never wakes.
  struct Bed {
    std::mutex mutex;
    std::condition_variable wake;
  };
  Bed* const bed_;
  std::vector<std::thread> workers_;
};

}  // namespace cvmk::engine
