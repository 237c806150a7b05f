// The threads that a kernel may use, handed in by its caller: one, OpenMP's (which are PyTorch's own where both are in one process), or a pool
// of the caller's.
//
// A result must not depend on which thread does an item: items write to places of their own. A thread's scratch memory is found by its number.
#pragma once

#include <stdint.h>

#include "common/inline.h"

namespace cvmk {

struct Team {
  typedef void (*Body)(void* context, int thread, int threads);

  // How many threads there are.
  int size = 1;
  // body(context, thread, threads) once in each of `threads` threads at the same time, numbered from 0, the caller among them; it returns when
  // all are done. `threads` is `width` (2 to size) or fewer. Null where size is 1.
  void (*fork)(void* pool, int width, Body body, void* context) = nullptr;
  // Called by every thread of a fork: waits for all of them.
  void (*barrier)(void* pool) = nullptr;
  void* pool = nullptr;

  // body(thread, threads) in each of up to `width` threads.
  template <typename F>
  CVMK_INLINE void together(int64_t width, const F& body) const {
    const int threads = width < size ? static_cast<int>(width) : size;
    if (threads <= 1) return body(0, 1);
    fork(pool, threads, [](void* context, int thread, int all) { (*static_cast<const F*>(context))(thread, all); }, const_cast<F*>(&body));
  }

  // Within `together`: waits for the other threads.
  CVMK_INLINE void wait(int threads) const {
    if (threads > 1) barrier(pool);
  }

  // body(i, thread) for i in [0, count), handed out one by one; in the calling thread where there is only one item or one thread.
  template <typename F>
  CVMK_INLINE void each(int64_t count, const F& body) const {
    if (count <= 1 || size <= 1) {
      for (int64_t i = 0; i < count; ++i) body(i, 0);
      return;
    }
    Queue queue;
    together(count, [&](int thread, int) {
      for (int64_t i = queue.take(); i < count; i = queue.take()) body(i, thread);
    });
  }

  // work(first, last, thread) for parts of [0, count), neighbours together, one part in each of up to `width` threads.
  template <typename F>
  CVMK_INLINE void share(int64_t width, int64_t count, const F& work) const {
    together(width, [&](int thread, int threads) { work(count * thread / threads, count * (thread + 1) / threads, thread); });
  }

  // before(i) for i in [0, first), then, when all are done, body(i, thread) for i in [0, second), in up to `width` threads. `enter` and `leave`
  // run once in every thread around its share of the second loop.
  template <typename Before, typename Enter, typename F, typename Leave>
  CVMK_INLINE void two_loops(int64_t width, int64_t first, const Before& before, int64_t second, const Enter& enter, const F& body, const Leave& leave) const {
    Queue queue;
    together(width, [&](int thread, int threads) {
      for (int64_t i = first * thread / threads, last = first * (thread + 1) / threads; i < last; ++i) before(i);
      if (first > 0) wait(threads);
      enter();
      for (int64_t i = queue.take(); i < second; i = queue.take()) body(i, thread);
      leave();
    });
  }

 private:
  // Hands out 0, 1, 2, ... to threads. On a cache line of its own: what stands beside it is read by all of them.
  struct alignas(64) Queue {
    int64_t next = 0;
    char rest[56];
    CVMK_INLINE int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
  };
};

// The threads of OpenMP, as many as a parallel region may use now: one within such a region. One without OpenMP.
Team openmp_team();

}  // namespace cvmk
